"""make_file: a small good file, or one with something changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import NUM_SAMPLES, every_form

from moemm.data import write_file

MakeFile = Callable[..., Path]


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """make_file(name, **changes) writes a good file with the given arguments of write_file changed."""

    def make(name: str = "good.h5", **changes: Any) -> Path:
        split = np.zeros(NUM_SAMPLES, np.uint8)
        split[12:18], split[18:] = 1, 2
        arguments: dict[str, Any] = {
            "task": "good",
            "labels": np.arange(NUM_SAMPLES) % 3,
            "class_names": ["x", "y", "z"],
            "split": split,
            "modalities": every_form(),
            **changes,
        }
        write_file(tmp_path / name, **arguments)
        return tmp_path / name

    return make
