"""Who may use which expert: what groups mean, and what is refused."""

from __future__ import annotations

import pytest
import torch

from moemm.config.layers import parse_layers
from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig
from moemm.errors import ConfigError
from moemm.moe import Expert, ExpertMap, Router

NAMES, TASKS = ("image", "audio", "text"), ("left", "right")


def make(*groups: Group, layers: int = 1) -> ExpertMap:
    return ExpertMap.from_config(groups, NAMES, TASKS, layers)


def test_ids_are_stable_and_tell_kind_and_modalities() -> None:
    groups = (
        Group(kind="shared", width=8),
        Group(kind="modality", width=4, modalities=["image", "text"], count=2),
        Group(kind="modality", width=4),
        Group(kind="routed", width=4, count=2),
        Group(kind="routed", width=6),
        Group(kind="routed", width=4, per_modality=True, modalities=["audio"]),
        Group(kind="zero"),
        Group(kind="lora", base="shared", rank=2, id="style", count=2),
    )
    assert [expert.id for expert in make(*groups).experts] == [
        "shared", "modality_image_text", "modality_image_text_1", "modality_audio",
        "routed_0", "routed_1", "routed_2", "routed_audio_0", "zero_0", "style_0", "style_1",
    ]  # fmt: skip


def test_the_matrix_says_who_may_use_what() -> None:
    expert_map = make(Group(kind="routed", width=4), Group(kind="routed", width=4, modalities=["audio"]))
    assert expert_map.allowed("routed").tolist() == [[True, False], [True, True], [True, False]]


def test_rows_are_pairs_of_modality_and_task_where_experts_name_tasks() -> None:
    expert_map = make(Group(kind="shared", width=4), Group(kind="modality", width=4, tasks=["right"]))
    assert expert_map.rows[:3] == (("image", "left"), ("image", "right"), ("audio", "left"))
    assert expert_map.allowed("hard").flatten().tolist() == [False, True] * 3
    modality_T, task_T = torch.tensor([0, 2, 1]), torch.tensor([1, 0, 1])
    assert [expert_map.rows[row] for row in expert_map.row(modality_T, task_T)] == [
        ("image", "right"), ("text", "left"), ("audio", "right"),
    ]  # fmt: skip


def test_layers_have_experts_of_their_own() -> None:
    expert_map = make(Group(kind="shared", width=4), Group(kind="routed", width=4, count=2, layers="every-2"), layers=4)
    assert [len(expert_map.at_layer(layer).experts) for layer in range(4)] == [1, 3, 1, 3]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", (0, 1, 2, 3)),
        ("every-2", (1, 3)),
        ("every-3", (2,)),
        ("first-1", (0,)),
        ("last-3", (1, 2, 3)),
        ("2,0,2", (0, 2)),
    ],
)
def test_texts_for_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("odd", "is not one of"),
        ("every-0", "is not one of"),
        ("", "is not one of"),
        ("0,4", "names layer 4"),
        ("every-9", "names no layer"),
    ],
)
def test_bad_texts_for_layers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layers(text, 4)


def test_what_a_token_passes_through() -> None:
    expert_map = make(
        Group(kind="shared", width=8),
        Group(kind="modality", width=4, modalities=["image"]),
        Group(kind="routed", width=3, count=2),
        Group(kind="routed", width=5, modalities=["audio"]),
    )
    used = {row[0]: expert_map.active(row, lambda e: e.width, top_k=2) for row in expert_map.rows}
    assert used == {"image": 8 + 4 + 3 + 3, "audio": 8 + 5 + 3, "text": 8 + 3 + 3}


BAD = {
    "unknown modality": (
        [Group(kind="modality", width=4, modalities=["image", "radar"])],
        "groups.0.modalities names radar; this run has image, audio, text",
    ),
    "unknown task": ([Group(kind="modality", width=4, tasks=["up"])], "groups.0.tasks names up"),
    "reaches nothing": (
        [Group(kind="modality", width=4, modalities=["image", "text"])],
        "audio reaches no expert in layer 0",
    ),
    "an id twice": (
        [Group(kind="shared", width=4, id="a"), Group(kind="routed", width=4, id="a")],
        "id a stands twice",
    ),
    "lora without base": (
        [Group(kind="shared", width=4), Group(kind="lora", base="other", rank=1)],
        "has base other, which is no expert with weights in layer 0; there: shared",
    ),
    "lora of a zero expert": (
        [Group(kind="shared", width=4), Group(kind="zero"), Group(kind="lora", base="zero_0", rank=1)],
        "has base zero_0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_maps_are_refused(name: str) -> None:
    groups, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        make(*groups)


def test_an_expert_in_other_layers_only_is_no_help() -> None:
    with pytest.raises(ConfigError, match="image reaches no expert in layer 0"):
        make(Group(kind="shared", width=4, layers="last-1"), layers=2)


def test_a_map_from_code() -> None:
    experts = (Expert(id="a", kind="shared", width=4), Expert(id="b", kind="routed", width=4, modalities=("audio",)))
    assert ExpertMap(experts, NAMES).allowed("routed").tolist() == [[False], [True], [False]]
    with pytest.raises(ConfigError, match="stands twice"):
        ExpertMap((*experts, experts[0]), NAMES)


def test_top_k_above_the_allowed_experts_is_refused() -> None:
    expert_map = make(Group(kind="routed", width=4), Group(kind="routed", width=4, modalities=["audio"]))
    with pytest.raises(ConfigError, match="top_k is 2, but image may use only 1 routed experts"):
        Router(8, expert_map, RouterConfig(top_k=2))


def test_disjoint_routers_want_disjoint_experts() -> None:
    with pytest.raises(ConfigError, match="routed_0 serves image, audio, text"):
        Router(8, make(Group(kind="routed", width=4)), RouterConfig(scope="disjoint"))
    Router(8, make(Group(kind="routed", width=4, per_modality=True)), RouterConfig(scope="disjoint"))


def test_an_unknown_router_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.router\.kind is magic; known are .*softmax"):
        Router(8, make(Group(kind="routed", width=4)), RouterConfig(kind="magic"))
