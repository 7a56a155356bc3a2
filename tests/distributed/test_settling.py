"""Settled gradients of two ranks against those of one, for every method, in fp32 and bf16; few jobs with many cases.

Those of one rank are held to plain PyTorch in tests/unit/harmonize/test_fork.py and tests/unit/train/test_trunk.py.
"""

from __future__ import annotations

import os
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
SOAK = os.environ.get("MOEMM_SOAK") == "1"
pytestmark = [pytest.mark.soak] if SOAK else []  # which tries more of the same
REMEMBERS = [("gradvac", "batch"), ("gradvac", "trunk"), ("curriculum", "sample"), ("curriculum", "trunk")]
PLAN = [
    *((stage, accumulation, [PLAIN, *SOME]) for stage in (0, 1, 3) for accumulation in (1, 4)),
    (2, 1, [PLAIN, *FORK, *TRUNK]),
    (2, 4, [PLAIN, *(FORK if SOAK else SOME[:-1]), SOME[-1], *REMEMBERS]),
]
"""(stage, accumulation, cases): every method in ZeRO-2, some in every stage; `make soak` accumulates for every one."""
LOW_PLAN = [
    (1, 1, [PLAIN, *SOME]),
    (2, 1, [PLAIN, *(FORK + TRUNK if SOAK else SOME + REMEMBERS)]),
    (2, 4, [PLAIN, *SOME]),
    (3, 1, [PLAIN, *SOME]),
]
"""The same in bf16, which DeepSpeed has no ZeRO-0 for; `make soak` tries every method."""
LIKE_SUM = tuple(f"dual_cone {per}" for per in ("modality", "expert", "batch", "trunk"))
"""What projects the sum may have nothing to do where gradients oppose each other, but not the sum."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("settling")
    (made / "rank_1").mkdir()
    for place in (made, made / "rank_1"):
        write_tiny_data(place)
    alone = [(0, accumulation, cases) for _, accumulation, cases in PLAN[-2:]]
    for ranks, precision, plan in ((1, "fp32", alone), (2, "fp32", PLAN), (2, "bf16", LOW_PLAN)):
        arguments = {"folder": str(made), "precision": precision, "plan": plan}
        run_distributed("settling:gradients", ranks=ranks, arguments=arguments, path=[HERE], timeout_s=250)
    return made


@pytest.mark.parametrize(("stage", "accumulation", "cases"), PLAN)
def test_two_ranks_settle_as_one(folder: Path, stage: int, accumulation: int, cases: list[tuple[str, str]]) -> None:
    one, two = (np.load(folder / f"fp32_{name}_{accumulation}.npz") for name in ("1_0", f"2_{stage}"))
    plain = one["sum batch"]
    wrong, idle = {}, {}
    for case in map(" ".join, cases):
        error = np.linalg.norm(two[case] - one[case]) / np.linalg.norm(one[case])
        change = np.linalg.norm(one[case] - plain) / np.linalg.norm(plain)
        if not error <= 5e-6:
            wrong[case] = float(error)
        if change < 1e-2 and case not in ("sum batch", *LIKE_SUM):
            idle[case] = float(change)
    assert not wrong and not idle


@pytest.mark.parametrize(("stage", "accumulation", "cases"), LOW_PLAN)
def test_bf16_settles_nearly_as_fp32(folder: Path, stage: int, accumulation: int, cases: list[tuple[str, str]]) -> None:
    full, low = (np.load(folder / f"{name}_{accumulation}.npz") for name in ("fp32_1_0", f"bf16_2_{stage}"))
    wrong = {}
    for case in map(" ".join, cases):
        near = [cosine(low[case], full[case]), np.linalg.norm(low[case]) / np.linalg.norm(full[case])]
        if not (near[0] >= 0.999 and 0.98 <= near[1] <= 1.02):
            wrong[case] = near
        if case not in ("sum batch", *LIKE_SUM):  # the plain sum is near some of them, and changes nothing
            change = cosine(low[case] - low["sum batch"], full[case] - full["sum batch"])
            if not change >= 0.98:
                wrong[f"change of {case}"] = [change]
    assert not wrong
    assert (low["sum batch"] != full["sum batch"]).mean() > 0.9, "this must not be fp32"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
