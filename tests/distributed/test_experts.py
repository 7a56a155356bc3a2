"""Experts over 2 and 4 ranks with gloo train as on one rank that has them all: losses, scores, norms and weights."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experts import CASES, ROWS, Case
from safetensors.torch import load_file

from moemm.testing.distributed import run_distributed
from moemm.testing.tiny import write_tiny_data

HERE = Path(__file__).parent
STAGES = (0, 1, 2, 3)
TWO: list[Case] = [
    *(("even", stage, 2) for stage in STAGES),
    *(("apart", stage, 2) for stage in (0, 3)),
    ("uneven", 2, 2),
    ("settled", 1, 2),
]
FOUR: list[Case] = [("apart", 2, 2), ("uneven", 1, 2), ("quarters apart", 3, 4)]
FP32 = [name for name in CASES if name != "bf16"]
# ZeRO 3 wants as many tensors on each rank.
EVEN = [name for name in FP32 if name not in ("uneven", "lora", "first layer", "placed")]
ALL: list[tuple[int, Case]] = [
    *((2, (name, stage, 2)) for name, stage in product(FP32, STAGES[:3]) if "quarters" not in name),
    *((2, (name, 3, 2)) for name in EVEN if "quarters" not in name),
    *((4, (name, stage, 2)) for name, stage in product(("even", "apart", "uneven", "lora", "settled"), STAGES[:3])),
    *((4, (name, 3, 2)) for name in ("even", "apart", "wide", "settled")),
    *((4, (name, stage, 4)) for name, stage in product(("quarters", "quarters apart"), STAGES)),
]
BF16: list[Case] = [("bf16", stage, 2) for stage in (1, 2, 3)]
SAVED: dict[int, list[Case]] = {1: [("even", 0, 1)], 2: [("even", 2, 2), ("even", 3, 2)]}
GO_ON: dict[int, list[tuple[str, Case]]] = {
    1: [("even_2_2_2", ("even", 0, 1))],
    2: [("even_0_1_1", ("even", 1, 2)), ("even_2_2_2", ("even", 3, 1))],
    4: [("even_3_2_2", ("even", 2, 2))],
}
"""Ranks that go on, from whose checkpoint (case, ZeRO stage, ep_size, ranks), and how."""
Found = dict[tuple[int, str], dict[str, Any]]


def job(name: str, *, ranks: int, **arguments: Any) -> list[Any]:
    results = run_distributed(f"experts:{name}", ranks=ranks, arguments=arguments, path=[HERE], timeout_s=570)
    return [result.value for result in results]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("experts")
    for rank in range(4):
        own = made / f"rank_{rank}" if rank else made
        own.mkdir(exist_ok=True)
        write_tiny_data(own)
    return made


def results_of(ranks: int, values: list[dict[str, Any]]) -> Found:
    for other in values[1:]:
        for name, value in other.items():
            assert value["losses"] == values[0][name]["losses"], f"ranks report different losses of {name}"
            assert value["scores"] == values[0][name]["scores"]
    owns = {name: [value[name]["own"] for value in values] for name in values[0]}
    return {(ranks, name): {**value, "own": owns[name]} for name, value in values[0].items()}


def alone(names: list[str]) -> list[Case]:
    return [(name, 0, 1) for name in dict.fromkeys(names)]


@pytest.fixture(scope="module")
def ones(folder: Path) -> tuple[Found, dict[str, Any]]:
    """What one rank trained, and saved."""
    calls = [
        ("trained", {"folder": str(folder), "cases": alone([case[0] for case in (*TWO, *FOUR)])}),
        ("saved", {"folder": str(folder), "cases": SAVED[1]}),
    ]
    (found, whole), *_ = job("several", ranks=1, folder=str(folder), calls=calls)
    return results_of(1, [found]), whole


@pytest.fixture(scope="module")
def pairs(folder: Path, ones: tuple[Found, dict[str, Any]]) -> list[list[Any]]:
    """What two ranks did: of each its trained cases, poisoned, refused, saved, went_on."""
    calls = [
        ("trained", {"folder": str(folder), "cases": TWO}),
        ("poisoned", {"folder": str(folder), "cases": [("even", 2, 2)]}),
        ("refused", {"folder": str(folder)}),
        ("saved", {"folder": str(folder), "cases": SAVED[2]}),
        ("went_on", {"folder": str(folder), "pairs": GO_ON[2]}),
    ]
    return job("several", ranks=2, folder=str(folder), calls=calls)


@pytest.fixture(scope="module")
def fours(folder: Path, pairs: list[list[Any]]) -> list[list[Any]]:
    """What four ranks did: of each its trained cases, guarded, dispatched, went_on."""
    calls = [
        ("trained", {"folder": str(folder), "cases": FOUR}),
        ("guarded", {"folder": str(folder)}),
        ("dispatched", {}),
        ("went_on", {"folder": str(folder), "pairs": GO_ON[4]}),
    ]
    return job("several", ranks=4, folder=str(folder), calls=calls)


@pytest.fixture(scope="module")
def checkpoints(folder: Path, ones: Any, pairs: Any, fours: Any) -> dict[str, Any]:
    """Losses, and what was held, of all runs that saved or went on."""
    back = job("went_on", ranks=1, folder=str(folder), pairs=GO_ON[1])[0]
    return {**ones[1], **pairs[0][3], **pairs[0][4], **fours[0][3], **back}


def assert_same(folder: Path, found: Found, case: Case, ranks: int, *, tolerance: float = 1e-5) -> None:
    name, alone = " ".join(map(str, case)), f"{case[0]} 0 1"
    one, many = found[1, alone], found[ranks, name]
    assert min(one["moved"]) > 50 * tolerance, "weights must move for this to mean anything"
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(many["scores"], one["scores"], rtol=0, atol=tolerance)
    np.testing.assert_allclose(many["norm"], one["norm"], rtol=tolerance)
    whole, joined = load_file(folder / f"{alone}.1"), load_file(folder / f"{name}.{ranks}")
    assert whole.keys() == joined.keys()
    for key, value in whole.items():
        np.testing.assert_allclose(joined[key].float(), value.float(), rtol=0, atol=tolerance, err_msg=key)
    assert_spread(many["own"], set(one["own"][0]), case[2])


def assert_spread(own: list[list[str]], names: set[str], ep_size: int) -> None:
    """In each group every expert is on one rank."""
    for first in range(0, len(own), ep_size):
        group = own[first : first + ep_size]
        assert sorted(name for rank in group for name in rank) == sorted(names)
        assert all(group), "every rank has experts"


@pytest.mark.parametrize("case", TWO, ids=str)
def test_two_ranks_train_as_one(folder: Path, ones: Any, pairs: Any, case: Case) -> None:
    assert_same(folder, ones[0] | results_of(2, [rank[0] for rank in pairs]), case, 2)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_ranks_train_as_one(folder: Path, ones: Any, fours: Any, case: Case) -> None:
    assert_same(folder, ones[0] | results_of(4, [rank[0] for rank in fours]), case, 4)


def test_values_that_are_not_finite_do_not_reach_experts_of_other_ranks(pairs: Any) -> None:
    for rank in pairs:
        step, finite, losses, messages = rank[1]["2"]
        assert (step, finite) == (4, True)
        assert np.isfinite(losses).all()
        assert any("infinite" in text for text in messages), "the sample must be found for this to mean anything"


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        ("uneven", "deepspeed.zero_stage is 3, .*in layer 0 the experts of position 0 have 6 tensors .* 1 have 4"),
        ("frozen", "in layer 0 the experts of position 1 are all frozen, and those of position 0 are not"),
        ("too many", "in layer 0 position 1 would have no expert: there are 1 to spread"),
        ("prefetch", "stage3_prefetch_bucket_size: ranks have experts of different sizes"),
        ("does not divide", "ep_size: does not divide the 2 ranks of this run.*allowed: 1, 2"),
    ],
)
def test_what_deepspeed_cannot_train_is_refused_at_the_start(pairs: Any, trial: str, said: str) -> None:
    for rank in pairs:
        assert re.search(said, rank[2][trial], re.DOTALL), rank[2][trial]


def test_guard_compares_experts_among_the_ranks_that_hold_them(fours: Any) -> None:
    for rank in fours:
        said = rank[1]
        assert "rank 0 has trunk.blocks" in said["experts"] and "rank 2 has trunk.blocks" in said["experts"]
        assert ".experts." in said["experts"]
        assert "rank 1 has" in said["dense"] and ".experts" not in said["dense"].split("rank 1 has")[0]
        assert "rank 3" in said["place"] and "ffn.experts" in said["place"]


@pytest.mark.parametrize(("rows", "modality"), [*product(ROWS, (None, 0))])
def test_a_layer_over_ranks_is_one_layer(fours: Any, rows: str, modality: int | None) -> None:
    for rank in fours:
        differences, counted, expected = rank[2][f"{rows} {modality}"]
        assert max(differences.values()) < 1e-12, differences
        assert counted == expected, "bytes and messages of a pass forward"


@pytest.mark.parametrize(
    ("ranks", "source", "case"), [(ranks, *pair) for ranks, pairs in GO_ON.items() for pair in pairs], ids=str
)
def test_checkpoints_are_read_with_experts_on_other_ranks(
    checkpoints: dict[str, Any], ranks: int, source: str, case: Case
) -> None:
    losses, held = checkpoints[source]
    again, held_again = checkpoints["_".join(map(str, (source, "to", *case, ranks)))]
    assert held_again == held, "weights and states of the optimizer, to the bit"
    np.testing.assert_allclose(again, losses[2:], rtol=0, atol=1e-5)


@pytest.mark.soak
def test_every_case_and_stage_trains_as_one(folder: Path) -> None:
    found = results_of(1, job("trained", ranks=1, folder=str(folder), cases=alone([case[0] for _, case in ALL])))
    for ranks in (2, 4):
        cases = [case for number, case in ALL if number == ranks]
        found |= results_of(ranks, job("trained", ranks=ranks, folder=str(folder), cases=cases))
    for ranks, case in ALL:
        assert_same(folder, found, case, ranks)


@pytest.mark.soak
def test_bf16_is_as_near_to_one_rank_as_bf16_can_be(folder: Path) -> None:
    one = job("trained", ranks=1, folder=str(folder), cases=[("bf16", 1, 1)])[0]["bf16 1 1"]
    for case, found in job("trained", ranks=2, folder=str(folder), cases=BF16)[0].items():
        np.testing.assert_allclose(found["losses"], one["losses"], rtol=0, atol=2e-2, err_msg=case)
        np.testing.assert_allclose(found["norm"], one["norm"], rtol=2e-2)
