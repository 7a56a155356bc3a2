from __future__ import annotations

from collections.abc import Iterator

import pytest

from moemm.testing.forked import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where ranks are forked from: it imports torch and DeepSpeed once."""
    with Nursery() as made:
        yield made
