"""Runs `python -m moemm` the way a user does, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = """\
name: tiny
data:
  tasks:
    - {name: digits, file: digits.h5, modalities: [image]}
model:
  dim: 64
train: {epochs: 2}
"""

Result = subprocess.CompletedProcess[str]


@pytest.fixture
def moemm(tmp_path: Path) -> Callable[..., Result]:
    """Runs moemm with these arguments in the test's folder; extra environment by name."""

    def run(*arguments: str | Path, **environment: str) -> Result:
        return subprocess.run(
            [sys.executable, "-m", "moemm", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"} | environment,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path
