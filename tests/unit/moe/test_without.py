"""An expert switched off: exactly its part is missing, and everything is as before afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig
from moemm.errors import ConfigError
from moemm.moe import ExpertMap, ExpertShape, MoELayer, without_expert

DIM, NAMES = 12, ("image", "audio")
GROUPS = (
    Group(kind="shared", width=8, id="all"),
    Group(kind="modality", width=6),
    Group(kind="routed", count=3, width=5),
    Group(kind="zero", count=1),
    Group(kind="lora", base="all", rank=2, modalities=["audio"], id="change"),
)


@pytest.fixture
def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    expert_map = ExpertMap.from_config(GROUPS, NAMES, (), 2)
    shape = ExpertShape(dim=DIM, activation="gelu", num_layers=2)
    made = nn.ModuleList(MoELayer(expert_map, shape, RouterConfig(top_k=2), layer=n).double() for n in range(2))
    for name, parameter in made.named_parameters():
        if "router" in name or ".up" in name:
            nn.init.normal_(parameter, std=1.0)
    return made


X_TD = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ROW_T = torch.arange(30) % 2


def outputs(layers: nn.ModuleList) -> torch.Tensor:
    return torch.stack([layer(X_TD, ROW_T)[0].detach() for layer in layers])


def with_zero_weights(layers: nn.ModuleList, expert: str) -> torch.Tensor:
    """The same by another way: an expert whose last weights are 0 adds nothing."""
    kept = {name: value.clone() for name, value in layers.state_dict().items()}
    for layer in layers:
        network = {**layer.shared, **layer.experts}[expert]
        with torch.no_grad():
            network.w2_DF.zero_()
    out = outputs(layers)
    layers.load_state_dict(kept)
    return out


@pytest.mark.parametrize("expert", ["modality_image", "modality_audio", "routed_0", "routed_2"])
def test_what_an_expert_adds_is_missing(layers: nn.ModuleList, expert: str) -> None:
    full, expected = outputs(layers), with_zero_weights(layers, expert)
    with without_expert(layers, expert):
        off = outputs(layers)
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-12)
    assert not torch.equal(off, full)


def test_a_shared_expert_goes_but_not_the_lora_expert_on_it(layers: nn.ModuleList) -> None:
    full = outputs(layers)
    with without_expert(layers, "all"):
        off = outputs(layers)
    added = torch.stack([layer.shared["all"](X_TD).detach() for layer in layers])
    torch.testing.assert_close(off, full - added, rtol=0, atol=1e-12)


def test_a_lora_expert_is_missed_by_those_whom_it_serves(layers: nn.ModuleList) -> None:
    full = outputs(layers)
    with without_expert(layers, "change"):
        off = outputs(layers)
    changed_LT = (off != full).any(-1)
    assert changed_LT[:, ROW_T == 1].all() and not changed_LT[:, ROW_T == 0].any()


def test_a_zero_expert_is_not_missed(layers: nn.ModuleList) -> None:
    full = outputs(layers)
    with without_expert(layers, "zero_0"):
        torch.testing.assert_close(outputs(layers), full, rtol=0, atol=0)


def test_routers_decide_as_before(layers: nn.ModuleList) -> None:
    before = layers[0](X_TD, ROW_T)[1]
    with without_expert(layers, "routed_1"):
        now = layers[0](X_TD, ROW_T)[1]
    assert torch.equal(now.load_LME, before.load_LME) and torch.equal(now.prob_LME, before.prob_LME)


@pytest.mark.parametrize("expert", ["all", "modality_image", "routed_1", "change"])
def test_all_is_as_before_also_after_an_error(layers: nn.ModuleList, expert: str) -> None:
    full = outputs(layers)
    tables = {name: buffer.clone() for name, buffer in layers.named_buffers()}
    with pytest.raises(KeyError), without_expert(layers, expert):
        raise KeyError
    assert torch.equal(outputs(layers), full)
    assert all(torch.equal(buffer, tables[name]) for name, buffer in layers.named_buffers())
    assert not any(module._forward_hooks for module in layers.modules())


def test_two_at_once(layers: nn.ModuleList) -> None:
    full = outputs(layers)
    with without_expert(layers, "routed_0"):
        one = outputs(layers)
        with without_expert(layers, "routed_1"):
            two = outputs(layers)
        assert torch.equal(outputs(layers), one)
    assert not torch.equal(one, two) and torch.equal(outputs(layers), full)


def test_an_expert_that_only_one_layer_has() -> None:
    groups = (Group(kind="shared", width=4), Group(kind="routed", count=2, width=4, layers="1", id="late"))
    expert_map = ExpertMap.from_config(groups, NAMES, (), 2)
    shape = ExpertShape(dim=DIM, activation="gelu", num_layers=2)
    layers = nn.ModuleList(MoELayer(expert_map, shape, RouterConfig(), layer=n).double() for n in range(2))
    full = outputs(layers)
    with without_expert(layers, "late_0"):
        off = outputs(layers)
    assert torch.equal(off[0], full[0]) and not torch.equal(off[1], full[1])


def test_an_expert_that_is_not_there(layers: nn.ModuleList) -> None:
    meant = r"'routed_9'; did you mean routed_\d\?\n.*all, modality_image"
    with pytest.raises(ConfigError, match=meant), without_expert(layers, "routed_9"):
        pass
    with pytest.raises(ConfigError, match="none"), without_expert(nn.Linear(2, 2), "all"):
        pass
