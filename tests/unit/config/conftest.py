"""A configuration that is right, to be spoilt in one place at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moemm.config import load_config

ConfigDict = dict[str, Any]


def minimal() -> ConfigDict:
    return {
        "data": {
            "tasks": [
                {"name": "digits", "file": "digits.h5", "modalities": ["image", "sound"], "rename": {"img": "image"}},
                {"name": "adult", "file": "adult.h5", "modalities": ["table", "text"]},
            ]
        },
        "modalities": {"image": {"kind": "image", "patch": [4, 4]}},
        "train": {"epochs": 2},
    }


@pytest.fixture
def values() -> ConfigDict:
    return minimal()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes text, or values as YAML, to a file of the test's folder."""

    def write_file(content: str | ConfigDict, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return write_file


@pytest.fixture
def recipe(write: Callable[..., Path]) -> Path:
    path = write(minimal())
    load_config(path)
    return path
