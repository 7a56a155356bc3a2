"""Redirected experts: the answer is that of copied weights, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig
from moemm.errors import ConfigError
from moemm.moe import ExpertMap, ExpertShape, MoELayer, redirected

NAMES, TASKS = ("image", "audio", "text"), ("left", "right")
SHARED, MODALITY, ROUTED = (
    Group(kind="shared", width=8),
    Group(kind="modality", width=6),
    Group(kind="routed", count=3, width=5),
)


def make_layer(*groups: Group) -> MoELayer:
    torch.manual_seed(0)
    expert_map = ExpertMap.from_config(groups, NAMES, TASKS)
    return MoELayer(expert_map, ExpertShape(dim=12, activation="gelu", num_layers=1), RouterConfig()).double()


def tokens(layer: MoELayer) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    return x_TD, torch.randint(0, len(layer.map.rows), (60,), generator=generator)


def test_it_is_as_if_the_experts_weights_were_copied() -> None:
    layer = make_layer(SHARED, MODALITY, ROUTED)
    x_TD, row_T = tokens(layer)
    before, _ = layer(x_TD, row_T)
    with redirected(nn.Sequential(layer), {"text": "image", "image": "audio"}):
        found, stats = layer(x_TD, row_T)
    copy = make_layer(SHARED, MODALITY, ROUTED)
    copy.experts["modality_text"].load_state_dict(layer.experts["modality_image"].state_dict())
    copy.experts["modality_image"].load_state_dict(layer.experts["modality_audio"].state_dict())
    expected, expected_stats = copy(x_TD, row_T)
    assert torch.equal(found, expected) and torch.equal(stats.load_LME, expected_stats.load_LME)
    audio = row_T == NAMES.index("audio")
    assert torch.equal(found[audio], before[audio])
    assert (found[~audio] != before[~audio]).any(1).all()


def test_everything_is_as_before_on_exit_also_by_an_exception() -> None:
    layer = make_layer(SHARED, MODALITY)
    x_TD, row_T = tokens(layer)
    before, _ = layer(x_TD, row_T)
    with pytest.raises(RuntimeError), redirected(layer, {"text": "image"}):
        raise RuntimeError("stopped")
    assert torch.equal(layer(x_TD, row_T)[0], before)
    with redirected(layer, {"text": "image"}), redirected(layer, {"text": "audio"}):
        pass
    assert torch.equal(layer(x_TD, row_T)[0], before)
    assert "hard_MK" not in layer.state_dict()


def test_skills_stay_with_their_task() -> None:
    left = Group(kind="modality", width=6, modalities=["image"], tasks=["left"])
    right = Group(kind="modality", width=6, modalities=["image"], tasks=["right"])
    layer = make_layer(SHARED, left, right, Group(kind="modality", width=6, modalities=["text"]))
    x_TD, _ = tokens(layer)
    rows = {task: layer.map.rows.index(("text", task)) for task in TASKS}
    with redirected(layer, {"text": "image"}):
        for task, number in rows.items():
            found, _ = layer(x_TD, torch.full((60,), number))
            expected = layer.shared["shared"](x_TD) + layer.experts[f"modality_image_{task}"](x_TD)
            torch.testing.assert_close(found, expected)


def test_to_itself_changes_nothing() -> None:
    layer = make_layer(MODALITY, ROUTED)
    x_TD, row_T = tokens(layer)
    before, _ = layer(x_TD, row_T)
    with redirected(layer, {"text": "text"}):
        assert torch.equal(layer(x_TD, row_T)[0], before)


@pytest.mark.parametrize("experts_of", [{"smell": "text"}, {"text": "smell"}])
def test_an_unknown_modality_is_refused(experts_of: dict[str, str]) -> None:
    with (
        pytest.raises(ConfigError, match="no modality 'smell' in this model; it has image, audio, text"),
        redirected(make_layer(MODALITY), experts_of),
    ):
        pass


def test_a_model_without_modality_experts_is_refused() -> None:
    with (
        pytest.raises(ConfigError, match="no modality experts to exchange"),
        redirected(make_layer(SHARED, ROUTED), {"text": "image"}),
    ):
        pass
