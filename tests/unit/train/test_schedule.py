from __future__ import annotations

from itertools import pairwise

import pytest

from moemm.train.schedule import learning_rate


def rates(**options: float) -> list[float]:
    settings = {"peak": 1.0, "warmup": 0.2, "floor": 0.1, **options}
    return [learning_rate(step, total=50, **settings) for step in range(50)]


def test_rises_linearly_then_falls_to_the_floor() -> None:
    found = rates()
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert all(after < before for before, after in pairwise(found[10:]))
    assert found[-1] == pytest.approx(0.1)


def test_halfway_down_is_the_middle() -> None:
    assert learning_rate(5, total=11, peak=2.0, warmup=0.0, floor=0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_runs(total: int) -> None:
    assert all(0 <= learning_rate(s, total=total, peak=1.0, warmup=1.0, floor=0.0) <= 1 for s in range(total + 1))
