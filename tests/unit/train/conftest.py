from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moemm.testing.tiny import write_tiny_data


@pytest.fixture
def alone() -> Iterator[None]:
    """Training in this process changes its environment and torch's determinism; both are put back."""
    before, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_data(folder)
    return folder
