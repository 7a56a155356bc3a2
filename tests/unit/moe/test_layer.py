"""The MoE layer against its definition, one token at a time. T tokens, D width, M rows."""

from __future__ import annotations

import pytest
import torch

from moemm.config.schema import ExpertGroupConfig as Group
from moemm.config.schema import RouterConfig
from moemm.moe import ExpertMap, ExpertShape, FeedForward, MoELayer

DIM, NAMES, TASKS = 12, ("image", "audio", "text"), ("left", "right")
SHARED, MODALITY, ROUTED = (
    Group(kind="shared", width=8),
    Group(kind="modality", width=6),
    Group(kind="routed", count=3, width=5),
)


def make_layer(*groups: Group, activation: str = "gelu", **router: object) -> MoELayer:
    torch.manual_seed(0)
    expert_map = ExpertMap.from_config(groups or (SHARED, MODALITY, ROUTED), NAMES, TASKS)
    shape = ExpertShape(dim=DIM, activation=activation, num_layers=2)
    layer = MoELayer(expert_map, shape, RouterConfig(**router)).double()
    for name, parameter in layer.named_parameters():
        if "router" in name or ".up" in name:
            torch.nn.init.normal_(parameter, std=1.0 if "router" in name else 0.1)
    return layer


def tokens(layer: MoELayer, count: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return x_TD, torch.randint(0, len(layer.map.rows), (count,), generator=generator)


def expert_of(layer: MoELayer, name: str, x_D: torch.Tensor) -> torch.Tensor:
    """Output of one expert, by its definition."""
    expert = next(expert for expert in layer.map.experts if expert.id == name)
    networks = {**layer.shared, **layer.experts}
    if expert.kind == "zero":
        return torch.zeros_like(x_D)
    if expert.kind != "lora":
        return networks[name](x_D)
    base, change = networks[expert.base], networks[name]
    w1 = base.w1_FD + change.up1_FR @ change.down1_RD
    w2 = base.w2_DF + change.up2_DR @ change.down2_RF
    return w2 @ base.activation(w1 @ x_D)


def token_by_token(layer: MoELayer, x_TD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
    """The layer's definition, for softmax routers of one scope and raw gates."""
    out = []
    routed = layer.map.of_role("routed")
    for x_D, number in zip(x_TD, row_T.tolist(), strict=True):
        row = layer.map.rows[number]
        y_D = torch.zeros_like(x_D)
        for expert in layer.map.experts:
            if expert.role != "routed" and expert.serves(*row):
                y_D = y_D + expert_of(layer, expert.id, x_D)
        if layer.router is not None:
            weights = layer.router.rows["all"]
            logits = [(weights[e.id] * x_D).sum() if e.serves(*row) else x_D.new_tensor(-torch.inf) for e in routed]
            prob = torch.stack(logits).softmax(0)
            for chosen in prob.argsort(descending=True)[: layer.router.top_k].tolist():
                y_D = y_D + prob[chosen] * expert_of(layer, routed[chosen].id, x_D)
        out.append(y_D)
    return torch.stack(out)


MAPS: dict[str, tuple[Group, ...]] = {
    "default": (SHARED, MODALITY, ROUTED),
    "shared alone": (SHARED,),
    "two shared": (Group(kind="shared", width=8, count=2), ROUTED),
    "modality alone": (MODALITY,),
    "routed alone": (ROUTED,),
    "a share group of two experts": (Group(kind="modality", width=4, modalities=["image", "text"], count=2), MODALITY),
    "unequal widths": (Group(kind="routed", width=3), Group(kind="routed", width=9, count=2)),
    "forbidden": (Group(kind="routed", width=3, count=2), Group(kind="routed", width=4, modalities=["audio"])),
    "block diagonal": (Group(kind="routed", width=3, count=2, per_modality=True),),
    "zero experts": (ROUTED, Group(kind="zero", count=2)),
    "skills of tasks": (
        SHARED,
        Group(kind="modality", width=5, tasks=["left"]),
        Group(kind="modality", width=3, tasks=["right"], modalities=["audio", "text"]),
        ROUTED,
    ),
    "routed lora": (SHARED, Group(kind="lora", base="shared", rank=2, count=3)),
    "lora of a modality": (SHARED, Group(kind="lora", base="shared", rank=2, modalities=["audio"]), ROUTED),
    "lora of a routed expert": (ROUTED, Group(kind="lora", base="routed_1", rank=1)),
}


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
@pytest.mark.parametrize("name", MAPS)
def test_layer_equals_its_definition(name: str, activation: str) -> None:
    top_k = 2 if name in ("default", "block diagonal", "zero experts", "unequal widths", "forbidden") else None
    layer = make_layer(*MAPS[name], activation=activation, top_k=top_k)
    x_TD, row_T = tokens(layer)
    torch.testing.assert_close(layer(x_TD, row_T)[0], token_by_token(layer, x_TD, row_T), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_equal_those_of_the_definition(name: str) -> None:
    layer = make_layer(*MAPS[name])
    x_TD, row_T = tokens(layer)
    weight_TD = torch.randn(x_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    grads = []
    for function in (lambda: layer(x_TD, row_T)[0], lambda: token_by_token(layer, x_TD, row_T)):
        layer.zero_grad()
        (function() * weight_TD).sum().backward()
        trained = [p for p in layer.parameters() if p.requires_grad]
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
    for fast, plain in zip(*grads, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens_and_a_gradient_for_every_parameter(name: str, count: int) -> None:
    layer = make_layer(*MAPS[name])
    out_TD, stats = layer(*tokens(layer, count))
    assert out_TD.shape == (count, DIM) and (stats is None or stats.tokens_M.sum() == count)
    out_TD.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters() if parameter.requires_grad)


def test_the_base_of_a_lora_expert_is_frozen_and_the_change_begins_at_zero() -> None:
    torch.manual_seed(0)
    expert_map = ExpertMap.from_config(MAPS["routed lora"], NAMES)
    layer = MoELayer(expert_map, ExpertShape(dim=DIM, activation="gelu", num_layers=1), RouterConfig())
    shared = layer.shared["shared"]
    assert not any(parameter.requires_grad for parameter in shared.parameters())
    w1, w2 = layer.experts["lora_1"].weights(shared.weights())
    assert torch.equal(w1, shared.w1_FD) and torch.equal(w2, shared.w2_DF)


def test_adding_an_expert_appends_and_reshapes_nothing() -> None:
    small, large = make_layer(ROUTED), make_layer(ROUTED, Group(kind="routed", width=7))
    old, new = small.state_dict(), large.state_dict()
    assert set(old) < set(new)
    assert all(new[name].shape == value.shape for name, value in old.items())


def test_adding_a_modality_to_routers_of_their_own_reshapes_nothing() -> None:
    shape, router = ExpertShape(dim=DIM, activation="gelu", num_layers=1), RouterConfig(scope="modality")
    old, new = (
        MoELayer(ExpertMap.from_config((MODALITY, ROUTED), names), shape, router).state_dict()
        for names in (NAMES, (*NAMES, "radar"))
    )
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

    def forward(self, x_TD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
        return self.layer(x_TD, row_T)[0]


@pytest.mark.parametrize("name", ["default", "zero experts", "skills of tasks", "lora of a modality"])
def test_a_whole_layer_compiles_as_one_graph_and_exports(name: str) -> None:
    layer = make_layer(*MAPS[name], activation="swiglu", top_k=2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    trained = [p for p in layer.parameters() if p.requires_grad]
    for count in (7, 20):
        given = tokens(layer, count)
        grads = []
        for function in (layer, compiled):
            layer.zero_grad()
            out_TD, stats = function(*given)
            (out_TD.square().sum() + stats.z_LM.sum() + stats.prob_LME.square().sum()).backward()
            grads.append([out_TD.detach(), *(p.grad.clone() for p in trained)])
        for plain, other in zip(*grads, strict=True):
            torch.testing.assert_close(plain, other)
    exported = torch.export.export(Output(layer), given).module()
    torch.testing.assert_close(exported(*given), layer(*given)[0])


def sent_to(layer: MoELayer, x_TD: torch.Tensor, row_T: torch.Tensor) -> list[str | None]:
    """Of each token, by name: the routed expert with the highest gate, or its first modality expert, or none."""
    routes = None if layer.router is None else layer.router(x_TD, row_T).topk
    names, found = [expert.id for expert in layer.map.of_role("routed")], []
    for token, number in enumerate(row_T.tolist()):
        used = []
        if routes is not None:
            slots = zip(routes.gates_TK[token].tolist(), routes.experts_TK[token].tolist(), strict=True)
            used = [(gate, names[expert]) for gate, expert in slots if expert >= 0]
        own = [e.id for e in layer.map.of_role("hard") if e.serves(*layer.map.rows[number])]
        found.append(max(used)[1] if used else own[0] if own else None)
    return found


@pytest.mark.parametrize(
    ("groups", "router", "some_none"),
    [
        ((SHARED, MODALITY, ROUTED), {"top_k": 2}, False),
        ((SHARED, MODALITY, ROUTED), {"kind": "expert_choice", "capacity": 0.5}, False),
        ((SHARED, ROUTED), {"kind": "batch_priority", "capacity": 0.5}, True),
        ((SHARED, ROUTED, Group(kind="zero", count=2)), {"kind": "top_p", "p": 0.7}, False),
        ((SHARED, MODALITY), {}, False),
        ((SHARED, Group(kind="modality", width=4, modalities=["audio", "text"])), {}, True),
    ],
)
def test_tokens_are_told_apart_by_where_they_were_sent(
    groups: tuple[Group, ...], router: dict[str, object], some_none: bool
) -> None:
    layer = make_layer(*groups, **router)
    x_TD, row_T = tokens(layer)
    choice_T = layer.choice(row_T, layer(x_TD, row_T)[1])
    names = sent_to(layer, x_TD, row_T)
    assert layer.tells_apart and int(choice_T.min()) >= 0 and int(choice_T.max()) < layer.num_choices
    same_TT = torch.tensor([[a == b for a in names] for b in names])
    assert torch.equal(choice_T[:, None] == choice_T, same_TT)
    assert len(set(names)) > 1 and (None in names) == some_none
    assert torch.equal(layer.choice(row_T[:0], layer(x_TD[:0], row_T[:0])[1]), row_T[:0]), "a rank without tokens"


def test_shared_experts_tell_no_tokens_apart() -> None:
    assert not make_layer(SHARED).tells_apart
