from __future__ import annotations

import pytest

from moemm.testing.forked import Nursery, shared_nursery


@pytest.fixture(scope="session")
def nursery() -> Nursery:
    """Where ranks are forked from: it imports torch and DeepSpeed once."""
    return shared_nursery()
