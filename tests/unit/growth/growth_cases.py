"""Tiny runs that grow in these tests; each is trained once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moemm.testing.tiny import tiny_config
from moemm.train import train

WIDTH = 32
TRUNK: dict[str, Any] = {"dim": 16, "heads": 2, "layers": 2}
DENSE: dict[str, Any] = {**TRUNK, "experts": {"groups": [{"kind": "shared", "width": WIDTH}]}}


def trained(folder: Path, **sections: dict[str, Any]) -> Path:
    """The folder of a run of six steps; torch's determinism is put back."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    sections["train"] = {"baselines": False, **sections.get("train", {})}
    loaded = tiny_config(folder, **sections)
    try:
        train(loaded)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    return Path(loaded.config.train.output)


def sparse(router: dict[str, Any], *groups: dict[str, Any]) -> dict[str, Any]:
    """A `model` section with a shared expert and these groups."""
    return {**TRUNK, "router": router, "experts": {"groups": [{"kind": "shared", "width": 8}, *groups]}}
