"""The router's losses: known values, the global batch over ranks, gradients. L layers, M rows, E experts."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig, RouterLossConfig
from moemm.moe import LOSSES, ExpertMap, ExpertShape, MoELayer, RouterStats, router_loss

DIM, NAMES = 12, ("image", "audio", "text")
NONE = dict.fromkeys(LOSSES, 0.0)


def stats(prob_LME: torch.Tensor, *, load_LME: torch.Tensor | None = None, tokens: float = 10.0) -> RouterStats:
    zero_LM = torch.zeros(prob_LME.shape[:2])
    load_LME = prob_LME.detach().clone() if load_LME is None else load_LME
    tokens_M = torch.full((prob_LME.shape[1],), tokens)
    return RouterStats(load_LME, prob_LME, torch.zeros_like(prob_LME), zero_LM, zero_LM, zero_LM, zero_LM, tokens_M)


def value(name: str, given: RouterStats, **options: float) -> float:
    allowed_LME = torch.ones(given.prob_LME.shape, dtype=torch.bool)
    config = RouterLossConfig(**{**NONE, name: 1.0, **options})
    return router_loss(given, allowed_LME=allowed_LME, config=config).item()


UNIFORM = torch.full((1, 2, 2), 5.0)
COLLAPSED = torch.tensor([[[10.0, 0.0], [0.0, 10.0]]])
SAME = torch.tensor([[[10.0, 0.0], [10.0, 0.0]]])


@pytest.mark.parametrize(
    ("name", "prob_LME", "wanted"),
    [
        ("balance", UNIFORM, 1.0),
        ("balance", COLLAPSED, 2.0),  # each modality on one expert, though the sum is balanced
        ("importance", UNIFORM, 0.0),
        ("importance", COLLAPSED, 1.0),
        ("global_entropy", UNIFORM, 0.0),
        ("global_entropy", COLLAPSED, math.log(2)),
        ("mutual_information", UNIFORM, 0.0),
        ("mutual_information", COLLAPSED, -math.log(2)),
        ("mutual_information", SAME, 0.0),
    ],
)
def test_known_values(name: str, prob_LME: torch.Tensor, wanted: float) -> None:
    assert value(name, stats(prob_LME)) == pytest.approx(wanted, abs=1e-5)


def test_the_threshold_of_global_entropy() -> None:
    assert value("global_entropy", stats(UNIFORM), min_experts=4.0) == pytest.approx(math.log(2))


def test_a_forbidden_expert_is_no_imbalance() -> None:
    prob_LME, allowed_LME = torch.tensor([[[5.0, 5.0, 0.0]]]), torch.tensor([[[True, True, False]]])
    config = RouterLossConfig(**{**NONE, "importance": 1.0, "balance": 1.0})
    assert router_loss(stats(prob_LME), allowed_LME=allowed_LME, config=config).item() == pytest.approx(1.0)


def make_layer(kind: str, **losses: float) -> tuple[MoELayer, RouterLossConfig]:
    torch.manual_seed(0)
    config = RouterLossConfig(**{**NONE, **losses})
    groups = [Group(kind="shared", width=4), Group(kind="routed", count=4, width=4)]
    shape = ExpertShape(dim=DIM, activation="gelu", num_layers=1)
    router = RouterConfig(kind=kind, top_k=2, losses=config)
    layer = MoELayer(ExpertMap.from_config(groups, NAMES), shape, router).double()
    for row in layer.router.parameters():
        torch.nn.init.normal_(row)
    return layer, config


def tokens(count: int = 60) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    row_T = torch.randint(0, len(NAMES), (count,), generator=generator)
    return x_TD, row_T, row_T


KIND_OF = {"load": "noisy", "combination": "combination"}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_reaches_the_router(name: str) -> None:
    layer, config = make_layer(
        KIND_OF.get(name, "softmax"), **{name: 1.0}, **({"min_experts": 4.0} if name == "global_entropy" else {})
    )
    allowed_LME = layer.map.allowed("routed")[None]
    loss = router_loss(layer(*tokens())[1], allowed_LME=allowed_LME, config=config)
    loss.backward()
    for row in layer.router.rows.parameters():
        assert row.grad is not None and row.grad.abs().max() > 1e-7


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "load"])
def test_over_ranks_it_is_that_of_the_global_batch(name: str) -> None:
    layer, config = make_layer(KIND_OF.get(name, "softmax"), **{name: 0.3})
    allowed_LME = layer.map.allowed("routed")[None]
    given = tokens()
    whole = router_loss(layer(*given)[1], allowed_LME=allowed_LME, config=config)
    rows = list(layer.router.rows.parameters())
    exact = torch.autograd.grad(whole, rows)
    parts = [layer(*(part[cut] for part in given))[1] for cut in (slice(0, 13), slice(13, 60))]
    total = sum(torch.cat([p.detach().flatten() for p in part.parts]) for part in parts)
    losses = [
        router_loss(part, allowed_LME=allowed_LME, config=config, reduce=lambda _: total, world_size=2)
        for part in parts
    ]
    for loss in losses:
        torch.testing.assert_close(loss, whole)
    averaged = [(a + b) / 2 for a, b in zip(*(torch.autograd.grad(loss, rows) for loss in losses), strict=True)]
    for mean, plain in zip(averaged, exact, strict=True):
        torch.testing.assert_close(mean, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_modality_without_tokens_adds_nothing_and_no_nan(name: str) -> None:
    layer, config = make_layer(KIND_OF.get(name, "softmax"), **{name: 1.0})
    allowed_LME = layer.map.allowed("routed")[None]
    x_TD, row_T, target_T = tokens(30)
    for cut in (30, 0):
        found = layer(x_TD[:cut], torch.zeros_like(row_T[:cut]), target_T[:cut])[1]
        loss = router_loss(found, allowed_LME=allowed_LME, config=config)
        assert torch.isfinite(loss) and (cut or loss.item() == 0.0)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(layer.router.rows.parameters())))


def test_statistics_of_layers_with_other_experts_share_their_columns() -> None:
    groups = [
        Group(kind="shared", width=4),
        Group(kind="routed", count=2, width=4),
        Group(kind="routed", count=1, width=4, layers="last-1"),
    ]
    expert_map = ExpertMap.from_config(groups, NAMES, layers=2)
    shape = ExpertShape(dim=DIM, activation="gelu", num_layers=2)
    found = []
    for layer in range(2):
        given = (part.float() if part.is_floating_point() else part for part in tokens())
        found.append(MoELayer(expert_map, shape, RouterConfig(), layer=layer)(*given)[1])
    joined = RouterStats.stack(found)
    assert joined.load_LME.shape == (2, 3, 3) and not joined.load_LME[0, :, 2].any() and joined.load_LME[1, :, 2].any()
    assert {field.name for field in fields(RouterStats)} >= {"entropy_LM", "dropped_LM"}
