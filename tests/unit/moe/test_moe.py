"""The MoE layer against a plain loop over tokens, and the bugs that peers shipped. T tokens, D width, M modalities."""

from __future__ import annotations

import pytest
import torch

from moemm.config.schema import ExpertsConfig
from moemm.errors import ConfigError
from moemm.moe import (
    ROUTERS,
    ExpertMap,
    ExpertShape,
    FeedForward,
    MoELayer,
    Router,
    Routing,
    register_router,
    router_loss,
)

DIM, NAMES = 12, ("image", "audio", "text")


def make_layer(activation: str = "gelu", top_k: int = 1, **options: object) -> MoELayer:
    torch.manual_seed(0)
    config = ExpertsConfig(**{"shared_width": 8, "modality_width": 6, "routed": 3, "routed_width": 5, **options})
    shape = ExpertShape(dim=DIM, activation=activation, num_layers=2, top_k=top_k)
    layer = MoELayer(ExpertMap.from_config(config, NAMES), shape).double()
    for row in layer.router.rows.values() if layer.router else ():
        torch.nn.init.normal_(row, std=1.0)
    return layer


def tokens(count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return x_TD, torch.randint(0, len(NAMES), (count,), generator=generator)


def token_by_token(layer: MoELayer, x_TD: torch.Tensor, modality_T: torch.Tensor) -> torch.Tensor:
    """The layer's definition, one token at a time."""
    out = []
    for x_D, modality in zip(x_TD, modality_T.tolist(), strict=True):
        y_D = sum((shared(x_D) for shared in layer.shared.values()), torch.zeros_like(x_D))
        for expert in layer.map.of_kind("modality"):
            if expert.serves(NAMES[modality]):
                y_D = y_D + layer.experts[expert.id](x_D)
        if layer.router is not None:
            logits = torch.stack([(row * x_D).sum() for row in layer.router.rows.values()])
            prob = logits.softmax(0)
            for chosen in prob.argsort(descending=True)[: layer.router.top_k].tolist():
                y_D = y_D + prob[chosen] * layer.experts[f"routed_{chosen}"](x_D)
        out.append(y_D)
    return torch.stack(out)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"shared_width": 0},
        {"modality_width": 0, "top_k": 3},
        {"routed": 0},
        {"groups": [["image", "text"]], "top_k": 2},
        {"shared_width": 4, "modality_width": 0, "routed": 0},
    ],
)
def test_layer_equals_its_definition(activation: str, options: dict[str, object]) -> None:
    layer = make_layer(activation, **options)
    x_TD, modality_T = tokens()
    torch.testing.assert_close(
        layer(x_TD, modality_T)[0], token_by_token(layer, x_TD, modality_T), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_router_has_a_gradient_for_every_k(top_k: int) -> None:
    layer = make_layer(top_k=top_k)
    x_TD, modality_T = tokens()
    layer(x_TD, modality_T)[0].square().sum().backward()
    for name, row in layer.router.rows.items():
        assert row.grad is not None and row.grad.abs().max() > 1e-6, name


def test_gradients_equal_those_of_the_definition() -> None:
    layer = make_layer(top_k=2)
    x_TD, modality_T = tokens()
    weight_TD = torch.randn(x_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = []
    for function in (lambda: layer(x_TD, modality_T)[0], lambda: token_by_token(layer, x_TD, modality_T)):
        layer.zero_grad()
        (function() * weight_TD).sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens_and_a_gradient_for_every_parameter(count: int) -> None:
    layer = make_layer(top_k=2)
    x_TD, modality_T = tokens(count)
    out_TD, stats = layer(x_TD, modality_T)
    assert out_TD.shape == (count, DIM) and stats.tokens_M.sum() == count
    out_TD.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_forbidden_experts_are_masked_before_the_softmax() -> None:
    allowed = torch.tensor([[True, False, True], [True, True, False]])
    router = Router(DIM, ["a", "b", "c"], allowed, top_k=2)
    x_TD = torch.randn(50, DIM)
    modality_T = torch.randint(0, 2, (50,))
    routed = router(x_TD, modality_T)
    assert not routed.prob_ME[~allowed].any() and not routed.load_ME[~allowed].any()
    torch.testing.assert_close(routed.prob_ME.sum(1), routed.tokens_M)
    assert allowed[modality_T].gather(1, routed.experts_TK).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_of_ones_own_gets_mask_and_statistics(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    monkeypatch.setattr("moemm.moe.router.ROUTERS", dict(ROUTERS))

    @register_router("plain")
    def plain(logits_TE: torch.Tensor, *, top_k: int) -> Routing:
        prob_TE = logits_TE.softmax(-1)
        return Routing(*prob_TE.topk(top_k), prob_TE)

    allowed = torch.tensor([[True, False, True], [True, True, False]])
    own, builtin = (Router(DIM, ["a", "b", "c"], allowed, top_k=top_k, kind=kind) for kind in ("plain", "softmax"))
    own.load_state_dict(builtin.state_dict())
    modality_T = torch.randint(0, 2, (50,))
    x_TD = torch.randn(50, DIM)
    for given, wanted in zip(own(x_TD, modality_T), builtin(x_TD, modality_T), strict=True):
        torch.testing.assert_close(given, wanted)
    with pytest.raises(ConfigError, match="registered twice"):
        register_router("plain")(plain)


def test_top_k_above_the_allowed_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="top_k is 2, but a modality may use only 1"):
        Router(DIM, ["a", "b"], torch.tensor([[True, True], [True, False]]), top_k=2)


def test_a_group_with_an_unknown_modality_is_refused() -> None:
    with pytest.raises(ConfigError, match="names radar; the modalities of this run are image, audio, text"):
        ExpertMap.from_config(ExpertsConfig(groups=[["image", "radar"]]), NAMES)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_router_breaks_ties_the_same_way_and_takes_no_tokens(name: str) -> None:
    given = torch.zeros(5, 4), torch.zeros(5, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool)
    first, second = (ROUTERS[name](*given, top_k=2) for _ in range(2))
    assert torch.equal(first.experts_TK, second.experts_TK) and len(set(first.experts_TK[0].tolist())) == 2
    assert ROUTERS[name](given[0][:0], given[1][:0], given[2], top_k=2).gates_TK.shape == (0, 2)


def test_balance_is_one_when_uniform_and_sees_a_collapse_that_pooling_hides() -> None:
    from moemm.moe import RouterStats

    allowed = torch.ones(2, 2, dtype=torch.bool)
    collapsed = torch.tensor([[[10.0, 0.0], [0.0, 10.0]]])
    uniform = torch.full((1, 2, 2), 5.0)

    def balance(load: torch.Tensor) -> float:
        stats = RouterStats(load, load.clone(), torch.zeros(1, 2), torch.full((2,), 10.0))
        return router_loss(stats, allowed_ME=allowed, balance_weight=1.0, z_weight=0.0).item()

    assert balance(uniform) == pytest.approx(1.0)
    assert balance(collapsed) == pytest.approx(2.0), "each modality on one expert, though the sum is balanced"


def test_router_loss_over_ranks_is_that_of_the_global_batch() -> None:
    layer = make_layer(top_k=2)
    x_TD, modality_T = tokens(60)
    options = {"allowed_ME": layer.map.allowed("routed"), "balance_weight": 0.3, "z_weight": 0.2}

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(loss, list(layer.router.rows.values()))

    whole = router_loss(layer(x_TD, modality_T)[1], **options)
    exact = gradients(whole)
    parts = [layer(x_TD[rows], modality_T[rows])[1] for rows in (slice(0, 13), slice(13, 60))]

    def flat(stats: object) -> torch.Tensor:
        pieces = (stats.load_LME, stats.prob_LME, stats.z_LM, stats.tokens_M)
        return torch.cat([piece.detach().flatten() for piece in pieces])

    total = flat(parts[0]) + flat(parts[1])
    losses = [router_loss(part, reduce=lambda _: total, world_size=2, **options) for part in parts]
    for loss in losses:
        torch.testing.assert_close(loss, whole)
    averaged = [(a + b) / 2 for a, b in zip(*map(gradients, losses), strict=True)]
    for mean, plain in zip(averaged, exact, strict=True):
        torch.testing.assert_close(mean, plain, atol=1e-6, rtol=1e-5)


def test_a_modality_without_tokens_adds_nothing_and_no_nan() -> None:
    layer = make_layer()
    x_TD, modality_T = tokens(30)
    options = {"allowed_ME": layer.map.allowed("routed"), "balance_weight": 1.0, "z_weight": 1.0}
    some = router_loss(layer(x_TD, torch.zeros_like(modality_T))[1], **options)
    none = router_loss(layer(x_TD[:0], modality_T[:0])[1], **options)
    assert torch.isfinite(some) and none.item() == 0.0


def test_adding_an_expert_appends_and_reshapes_nothing() -> None:
    small, large = make_layer(routed=3), make_layer(routed=4)
    old, new = small.state_dict(), large.state_dict()
    assert set(old) < set(new)
    assert all(new[name].shape == value.shape for name, value in old.items())


def test_swiglu_is_silu_of_one_half_times_the_other() -> None:
    torch.manual_seed(0)
    network = FeedForward(4, 3, activation="swiglu").double()
    x = torch.randn(5, 4, dtype=torch.float64)
    gate, up = (x @ network.w1_FD[half].T for half in (slice(0, 3), slice(3, 6)))
    torch.testing.assert_close(network(x), (gate * gate.sigmoid() * up) @ network.w2_DF.T)


class Output(torch.nn.Module):
    """A layer without its statistics: export wants plain tensors."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: torch.Tensor, modality_T: torch.Tensor) -> torch.Tensor:
        return self.layer(x_TD, modality_T)[0]


def test_a_whole_layer_compiles_as_one_graph_and_exports() -> None:
    layer = make_layer("swiglu", top_k=2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (7, 20):
        given = tokens(count)
        grads = []
        for function in (layer, compiled):
            layer.zero_grad()
            out_TD, stats = function(*given)
            (out_TD.square().sum() + stats.z_LM.sum() + stats.prob_LME.square().sum()).backward()
            grads.append([out_TD.detach(), *(p.grad.clone() for p in layer.parameters())])
        for plain, other in zip(*grads, strict=True):
            torch.testing.assert_close(plain, other)
    exported = torch.export.export(Output(layer), given).module()
    torch.testing.assert_close(exported(*given), layer(*given)[0])
