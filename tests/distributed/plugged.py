"""Jobs of test_plugged.py: what each rank does. Each function returns something JSON can hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from moemm.config import load_config
from moemm.errors import ConfigError
from moemm.modalities import KINDS
from moemm.train import train


def trained(folder: str) -> dict[str, Any]:
    """Train with a plugin in ZeRO-3; who has its kind afterwards, and the number of steps on rank 0."""
    summary = train(load_config(Path(folder) / "tiny.yaml"))
    return {"kind": KINDS["own"].__name__, "steps": summary.get("steps")}


def refused(folder: str, names: list[str]) -> str:
    """Train where this rank's plugin is the one of `names`; what it was told."""
    try:
        train(load_config(Path(folder) / "tiny.yaml", [f"--plugins=[{names[int(os.environ['RANK'])]}]"]))
    except ConfigError as error:
        return str(error)
    return "trained"
