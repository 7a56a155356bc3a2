"""Checkpoints that are read by another number of ranks or another ZeRO stage than wrote them."""

from __future__ import annotations

import os
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from resharding import KINDS, LAST, SAVED

from moemm.testing.distributed import run_distributed
from moemm.testing.tiny import write_tiny_data

HERE = Path(__file__).parent
SOAK = os.environ.get("MOEMM_SOAK") == "1"
pytestmark = [pytest.mark.soak] if SOAK else []  # which tries more of the same
ALONE = ["fp32 0", "bf16 2"]
"""Kinds that one rank begins, too."""
FEW = ["fp32 0", "fp32 1 round robin", "fp32 2", "fp32 3", "bf16 1 fp32 gradients", "bf16 3"]
PAIRS = [
    ("fp32 0 on 2", "fp32 0"),
    ("fp32 0 on 1", "fp32 3"),
    ("fp32 1 round robin on 2", "fp32 2"),
    ("fp32 2 on 2", "fp32 1"),
    ("fp32 3 on 2", "fp32 0"),
    ("bf16 1 fp32 gradients on 2", "bf16 3"),
    ("bf16 3 on 2", "bf16 1 fp32 gradients"),
]
"""Run that wrote the checkpoint, and how two ranks go on from it."""
TO_ONE = [("fp32 3 on 2", "fp32 2"), ("bf16 3 on 2", "bf16 1")]
"""The same for one rank."""
if SOAK:
    FEW = list(KINDS)
    same = [(kind, other) for kind, other in product(KINDS, KINDS) if kind[:4] == other[:4]]
    PAIRS = [(f"{kind} on 2", other) for kind, other in same]
    PAIRS += [(f"{kind} on 1", other) for kind, other in same if kind in ALONE]
    TO_ONE = [(f"{kind} on 2", other) for kind, other in same]


def job(name: str, *, ranks: int = 2, **arguments: Any) -> Any:
    results = run_distributed(f"resharding:{name}", ranks=ranks, arguments=arguments, path=[HERE], timeout_s=900)
    first = results[0].value
    assert all(result.value == first for result in results), "ranks report different losses"
    return first


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resharding")
    write_tiny_data(folder)
    (folder / "rank_1").mkdir()
    write_tiny_data(folder / "rank_1")
    found = job("begin", ranks=1, folder=str(folder), kinds=ALONE)
    found |= job("both", folder=str(folder), kinds=FEW, pairs=PAIRS)
    return found | job("go_on", ranks=1, folder=str(folder), pairs=TO_ONE)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("source", "kind", "ranks"), [*((*pair, 2) for pair in PAIRS), *((*pair, 1) for pair in TO_ONE)]
)
def test_goes_on_elsewhere(runs: dict[str, Any], source: str, kind: str, ranks: int) -> None:
    whole, held = runs[source]
    losses, again = runs[f"{source} to {kind} on {ranks}"]
    assert again == held, "weights and AdamW's states, to the last bit"
    assert len(losses) == LAST - SAVED and np.ptp(np.array(whole)[:, 0]) > 0.05, "the losses must move to mean anything"
    if source == f"{kind} on {ranks}":
        assert losses == whole[SAVED:]
    np.testing.assert_allclose(losses, whole[SAVED:], rtol=0, atol=1e-5 if "fp32 " in source[:5] else 0.02)


def test_kinds_differ_only_in_who_holds_what(runs: dict[str, Any]) -> None:
    for precision, other in permutations([kind for kind in FEW if kind.startswith("fp32")], 2):
        np.testing.assert_allclose(runs[f"{precision} on 2"][0], runs[f"{other} on 2"][0], rtol=0, atol=1e-5)
