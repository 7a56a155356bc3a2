from __future__ import annotations

from pathlib import Path

import pytest

from moemm.testing.tiny import write_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_data(folder)
    return folder
