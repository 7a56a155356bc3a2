"""Dealing hidden units: every token passes through each unit with weights that add up to 1, for any expert map."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from moemm.config.schema import ExpertGroupConfig, RouterConfig
from moemm.errors import ConfigError
from moemm.growth.deal import Dealt, deal, routes_of
from moemm.moe import ExpertMap

NAMES = ("image", "sound", "text")


def expert_map(*groups: dict[str, Any]) -> ExpertMap:
    return ExpertMap.from_config([ExpertGroupConfig(**group) for group in groups], NAMES)


def weight_of_units(here: ExpertMap, dealt: Dealt, router: RouterConfig, shards: int) -> dict[Any, list[float]]:
    """Row -> the weight of each unit, if routed experts are chosen as whole groups, whichever they are."""
    routes = routes_of(router, shards)
    found = {}
    for row in here.rows:
        total: dict[int, float] = defaultdict(float)
        serving = [e for e in here.experts if e.serves(*row)]
        routed = [e for e in serving if e.role == "routed" and (e.width or routes.even)]
        gate = 1.0 / len(routed) if routes.even and routed else 1.0
        chosen = routed if routes.even else routed[-routes.uses :] if routed else []
        if routes.gates == "renormalised" and chosen and not routes.even:
            gate = 1.0 / len(chosen)
        for expert in [e for e in serving if e.role != "routed"] + chosen:
            portion = dealt.portions.get(expert.id)
            for unit in range(portion.first, portion.last) if portion else ():
                assert portion is not None
                total[unit] += portion.scale * (gate if expert.role == "routed" else 1.0)
            assert portion is None or portion.count <= expert.width
        found[row] = [round(total[unit], 9) for unit in range(max(total) + 1)]
    return found


SHARED, EACH = {"kind": "shared", "width": 8}, {"kind": "modality", "width": 4}
POOL = {"kind": "routed", "count": 4, "width": 4}
CASES: list[tuple[list[dict[str, Any]], dict[str, Any], int, int]] = [
    ([SHARED, EACH, POOL], {}, 1, 16),
    ([SHARED, EACH, POOL], {}, 1, 11),  # with room for more
    ([SHARED, EACH, POOL], {"top_k": 2}, 2, 20),
    ([POOL], {"top_k": 2, "gates": "renormalised"}, 2, 8),
    ([POOL], {"top_k": 4, "gates": "renormalised"}, 2, 8),
    ([POOL], {"top_k": 2}, 1, 4),
    ([SHARED, {**EACH, "modalities": ["image"]}, POOL], {}, 1, 12),  # others have no such expert
    ([{**EACH, "modalities": ["image"]}, {**POOL, "modalities": ["sound", "text"]}], {}, 1, 4),
    ([{**EACH, "modalities": ["image", "sound"]}, {**EACH, "width": 6}], {}, 1, 4),
    ([{**EACH, "modalities": ["image"], "width": 3}, {**EACH, "modalities": [*NAMES], "width": 5}], {}, 1, 5),
    ([{**EACH, "count": 2}], {}, 1, 8),
    ([{"kind": "routed", "width": 3}, {"kind": "routed", "width": 5, "per_modality": True}], {"kind": "hard"}, 1, 8),
    ([{**POOL, "count": 2, "per_modality": True}], {"kind": "softmax", "scope": "disjoint"}, 1, 4),
    ([POOL, {"kind": "zero", "count": 2}], {"top_k": 2}, 2, 8),
    ([{**POOL, "count": 2}, {**POOL, "width": 6}], {"top_k": 2, "gates": "straight_through"}, 2, 8),
]


@pytest.mark.parametrize(("groups", "router", "shards", "units"), CASES)
def test_each_unit_counts_once_for_every_row(
    groups: list[dict[str, Any]], router: dict[str, Any], shards: int, units: int
) -> None:
    here, config = expert_map(*groups), RouterConfig(**router)
    dealt = deal(here, units, routes_of(config, shards))
    for row, weights in weight_of_units(here, dealt, config, shards).items():
        assert weights == [1.0] * units, row


def test_units_are_dealt_in_proportion() -> None:
    dealt = deal(expert_map(SHARED, EACH, POOL), 8, routes_of(RouterConfig(), 1))
    assert [dealt.portions[name].count for name in ("shared", "modality_image", "routed_0")] == [4, 2, 2]


def test_shards_of_a_group_stand_together() -> None:
    """In a tie the router takes lower ids first: those must be whole groups."""
    dealt = deal(expert_map(POOL), 8, routes_of(RouterConfig(top_k=2), 2))
    assert dealt.twins == [["routed_0", "routed_1"], ["routed_2", "routed_3"]]
    spans = [(dealt.portions[f"routed_{n}"].first, dealt.portions[f"routed_{n}"].last) for n in range(4)]
    assert spans == [(0, 4), (4, 8), (0, 4), (4, 8)]


@pytest.mark.parametrize(
    ("groups", "router", "shards", "units", "problem"),
    [
        ([SHARED, EACH, POOL], {}, 1, 17, "has 17 hidden units, but a token of image passes through only 16"),
        ([{**EACH, "modalities": ["image"]}, POOL], {}, 1, 5, "0 by modality, 4 routed"),
        ([POOL], {"top_k": 3}, 2, 8, "does not divide model.router.top_k"),
        ([{**POOL, "count": 3}], {"top_k": 2}, 2, 8, "does not divide the 3 routed experts"),
        ([POOL], {"kind": "expert_choice", "top_k": 2}, 2, 8, "would cut a group of 2 shards"),
        ([SHARED, {"kind": "lora", "base": "shared", "rank": 2}], {}, 1, 8, "lora expert"),
        ([POOL, {**POOL, "modalities": ["text"]}], {"kind": "hard"}, 1, 8, "averages other numbers of experts"),
        ([{**POOL, "count": 1}, {"kind": "zero", "count": 3}], {"top_k": 2}, 1, 4, "only 1 of the routed experts"),
    ],
)  # fmt: skip
def test_what_cannot_hold_the_network_is_refused(
    groups: list[dict[str, Any]], router: dict[str, Any], shards: int, units: int, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        deal(expert_map(*groups), units, routes_of(RouterConfig(**router), shards))
