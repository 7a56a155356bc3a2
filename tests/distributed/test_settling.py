"""Settled gradients of two ranks against those of one, for every method; one job for each number of ranks.

Those of one rank are held to plain PyTorch in tests/unit/harmonize/test_fork.py and tests/unit/train/test_trunk.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moemm.harmonize import HARMONIZERS
from moemm.testing.distributed import run_distributed
from moemm.testing.tiny import write_tiny_data

HERE = Path(__file__).parent
METHODS = sorted(set(HARMONIZERS) - {"sum"})
FORK = [(method, per) for method in METHODS for per in ("sample", "modality", "expert", "batch")]
FORK.remove(("gradvac", "sample"))  # refused: its averages are over all samples
TRUNK = [(method, "trunk") for method in METHODS]
SOME = [("upgrad", "sample"), ("pcgrad", "modality"), ("mgda", "batch"), ("upgrad", "expert"), ("upgrad", "trunk")]
PLAIN = ("sum", "batch")
PLAN = [
    *((stage, accumulation, [PLAIN, *SOME]) for stage in (0, 1, 3) for accumulation in (1, 4)),
    (2, 1, [PLAIN, *FORK, *TRUNK]),
    (2, 4, [PLAIN, *FORK, ("upgrad", "trunk"), ("gradvac", "trunk"), ("curriculum", "trunk")]),
]
"""(stage, accumulation, cases): every method in ZeRO-2, some in every stage."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("settling")
    (made / "rank_1").mkdir()
    for place in (made, made / "rank_1"):
        write_tiny_data(place)
    alone = [(0, accumulation, cases) for _, accumulation, cases in PLAN[-2:]]
    for ranks, plan in ((1, alone), (2, PLAN)):
        run_distributed(
            "settling:gradients", ranks=ranks, arguments={"folder": str(made), "plan": plan}, path=[HERE], timeout_s=250
        )
    return made


@pytest.mark.parametrize(("stage", "accumulation", "cases"), PLAN)
def test_two_ranks_settle_as_one(folder: Path, stage: int, accumulation: int, cases: list[tuple[str, str]]) -> None:
    one, two = (np.load(folder / f"{name}_{accumulation}.npz") for name in ("1_0", f"2_{stage}"))
    plain = one["sum batch"]
    wrong, idle = {}, {}
    for case in map(" ".join, cases):
        error = np.linalg.norm(two[case] - one[case]) / np.linalg.norm(one[case])
        change = np.linalg.norm(one[case] - plain) / np.linalg.norm(plain)
        if not error <= 5e-6:
            wrong[case] = float(error)
        # What projects the sum may have nothing to do where gradients oppose each other, but not the sum.
        if change < 1e-2 and case not in (
            "sum batch",
            *(f"dual_cone {per}" for per in ("modality", "expert", "batch", "trunk")),
        ):
            idle[case] = float(change)
    assert not wrong and not idle
