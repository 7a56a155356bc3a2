"""Who holds which expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moemm.config.schema import ExpertGroupConfig as Group
from moemm.errors import ConfigError
from moemm.moe import ExpertMap
from moemm.moe.dispatcher import _once
from moemm.moe.placement import dispatched, place_experts

NAMES = ("image", "audio", "text")
SHARED, MODALITY, ROUTED = (
    Group(kind="shared", width=8),
    Group(kind="modality", width=6),
    Group(kind="routed", count=3, width=5),
)
LORA = Group(kind="lora", base="routed_1", rank=2, count=2)


def made(*groups: Group, layers: int = 2) -> ExpertMap:
    return ExpertMap.from_config(groups or (SHARED, MODALITY, ROUTED), NAMES, (), layers)


def test_experts_are_dealt_out_in_turn_one_rank_further_in_each_layer() -> None:
    first, second = place_experts(made(), ep_size=2, given={})
    ids = ["modality_image", "modality_audio", "modality_text", "routed_0", "routed_1", "routed_2"]
    assert [first[name] for name in ids] == [0, 1, 0, 1, 0, 1]
    assert [second[name] for name in ids] == [1, 0, 1, 0, 1, 0]
    assert list(first) == ids, "shared experts are on every rank"


def test_a_lora_expert_is_where_its_base_is_and_one_of_a_shared_expert_anywhere() -> None:
    expert_map = made(SHARED, ROUTED, LORA, Group(kind="lora", base="shared", rank=2), Group(kind="zero"), layers=1)
    (positions,) = place_experts(expert_map, ep_size=2, given={})
    assert positions["lora_0"] == positions["lora_1"] == positions["routed_1"]
    assert set(positions) == {"routed_0", "routed_1", "routed_2", "lora_0", "lora_1", "lora_2"}


def test_a_layer_that_sends_no_tokens_places_none() -> None:
    routed = Group(kind="routed", count=2, width=5, layers="1")
    assert place_experts(made(SHARED, routed), ep_size=2, given={}) == [{}, {"routed_0": 1, "routed_1": 0}]


def test_a_placement_for_all_layers_and_for_each() -> None:
    given = {"routed_0": [1], "routed_1": [0, 1], "routed_2": [0]}
    first, second = place_experts(made(SHARED, ROUTED), ep_size=2, given=given)
    assert first == {"routed_0": 1, "routed_1": 0, "routed_2": 0}
    assert second == {"routed_0": 1, "routed_1": 1, "routed_2": 0}


@pytest.mark.parametrize(
    ("given", "groups", "ep_size", "said"),
    [
        ({}, (SHARED, ROUTED), 4, "ep_size is 4, but in layer 0 position 3 would have no expert: there are 3"),
        ({"routed_O": [0]}, (ROUTED,), 2, "no expert that is spread is called routed_O; did you mean routed_2"),
        ({"shared": [0]}, (SHARED, ROUTED), 2, "no expert that is spread is called shared"),
        ({"routed_0": [0], "routed_1": []}, (ROUTED,), 2, "says nothing of routed_1, routed_2"),
        ({f"routed_{i}": [0] for i in range(3)}, (ROUTED,), 2, "layer 0 position 1 would have no expert"),
        (
            {"routed_0": [1], "routed_1": [1], "routed_2": [0], "lora_0": [1], "lora_1": [0]},
            (ROUTED, LORA), 2, "the lora expert lora_1 is at position 0, and its base routed_1, .*, at 1",
        ),
    ],
)  # fmt: skip
def test_placements_that_do_not_fit(given: dict[str, Any], groups: tuple[Group, ...], ep_size: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        place_experts(made(*groups), ep_size=ep_size, given=given)


def test_dispatched_experts_are_in_the_order_of_the_layer_without_those_that_compute_nothing() -> None:
    ids = [expert.id for expert in dispatched(made(Group(kind="zero"), ROUTED, MODALITY).at_layer(0))]
    assert ids == ["modality_image", "modality_audio", "modality_text", "routed_0", "routed_1", "routed_2"]


def test_a_token_goes_to_a_rank_once() -> None:
    owner_TK = torch.tensor([[0, 0, 1], [1, 0, 1], [-1, 2, 2], [-1, -1, -1]])
    assert _once(owner_TK).tolist() == [[0, -1, 1], [1, 0, -1], [-1, 2, -1], [-1, -1, -1]]
    assert _once(owner_TK[:0]).shape == (0, 3)
