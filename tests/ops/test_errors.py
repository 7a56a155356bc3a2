"""Arguments that no op may take: each is an error that names the argument, never a wild read."""

from __future__ import annotations

import pytest
import torch

from moemm import ops
from moemm.errors import KernelError
from moemm.ops.backend import COMPILED

T, D, K = 4, 6, 2
X = torch.randn(T, D)
Y = torch.randn(T * K, D)
ORDER = torch.arange(T * K)
INVERSE = ORDER.view(T, K)
GATES = torch.rand(T, K)

PERMUTE = {
    "x must have shape (T, D)": (X[0], ORDER, INVERSE),
    "order must have shape (R,)": (X, INVERSE, INVERSE),
    "inverse must have shape (T, K)": (X, ORDER, ORDER),
    "K >= 1": (X, ORDER[:0], INVERSE[:, :0]),
    "inverse must have 4 entries along T": (X, ORDER, INVERSE[:3]),
    "x must be of type float32, float64, bfloat16, but is float16": (X.half(), ORDER, INVERSE),
    "x must be of type float32, float64, bfloat16, but is int64": (X.long(), ORDER, INVERSE),
    "order must be of type int32, int64, but is int16": (X, ORDER.short(), INVERSE),
    "inverse must be of type int64, but is int32": (X, ORDER, INVERSE.int()),
    "order is on meta": (X, ORDER.to("meta"), INVERSE),
    "inverse is on meta": (X, ORDER, INVERSE.to("meta")),
}
COMBINE = {
    "y must have shape (R, D)": (Y[0], INVERSE, GATES),
    "inverse must have shape (T, K)": (Y, ORDER, GATES),
    "gates must have shape (T, K)": (Y, INVERSE, GATES[0]),
    "gates must have 4 entries along T": (Y, INVERSE, GATES[:3]),
    "gates must have 2 entries along K": (Y, INVERSE, GATES[:, :1]),
    "y must be of type": (Y.half(), INVERSE, GATES),
    "inverse must be of type int32, int64, but is float32": (Y, INVERSE.float(), GATES),
    "gates must be of type float32, but is float64": (Y, INVERSE, GATES.double()),
    "gates must be of type float64, but is float32": (Y.double(), INVERSE, GATES),
    "gates must be of type bfloat16, float32, but is float64": (Y.bfloat16(), INVERSE, GATES.double()),
    "inverse is on meta": (Y, INVERSE.to("meta"), GATES),
    "gates is on meta": (Y, INVERSE, GATES.to("meta")),
    "residual must have shape (T, D)": (Y, INVERSE, GATES, X[0]),
    "residual must have 4 entries along T": (Y, INVERSE, GATES, X[:3]),
    "residual must have 6 entries along D": (Y, INVERSE, GATES, X[:, :5]),
    "residual must be of type float32, but is float64": (Y, INVERSE, GATES, X.double()),
    "residual must be of type bfloat16, but is float32": (Y.bfloat16(), INVERSE, GATES, X),
    "residual is on meta": (Y, INVERSE, GATES, X.to("meta")),
}
EXPERTS = torch.zeros(T, K, dtype=torch.int64)
PLAN = {
    "experts must have shape (T, K)": (EXPERTS[0],),
    "experts must be of type int32, int64, but is int16": (EXPERTS.short(),),
}
LOGITS, MODALITY, ALLOWED = torch.randn(T, 3), torch.zeros(T, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
ROUTE = {
    "logits must have shape (T, E)": (LOGITS[0], MODALITY, ALLOWED),
    "modality must have shape (T,)": (LOGITS, MODALITY[:, None], ALLOWED),
    "allowed must have shape (M, E)": (LOGITS, MODALITY, ALLOWED[0]),
    "logits must be of type float32, float64, bfloat16, but is float16": (LOGITS.half(), MODALITY, ALLOWED),
    "modality must be of type int64, but is int32": (LOGITS, MODALITY.int(), ALLOWED),
    "allowed must be of type bool, but is int64": (LOGITS, MODALITY, ALLOWED.long()),
    "modality must have 4 entries along T": (LOGITS, MODALITY[:3], ALLOWED),
    "allowed must have 3 entries along E": (LOGITS, MODALITY, ALLOWED[:, :2]),
    "top_k must be 1 to 1": (LOGITS[:, :1], MODALITY, ALLOWED[:, :1]),
    "bias must have shape (E,)": (LOGITS, MODALITY, ALLOWED, LOGITS),
    "bias must have 3 entries along E": (LOGITS, MODALITY, ALLOWED, LOGITS[0, :2]),
    "modality is on meta": (LOGITS, MODALITY.to("meta"), ALLOWED),
    "allowed is on meta": (LOGITS, MODALITY, ALLOWED.to("meta")),
}
W1, W2 = [torch.randn(10, D)] * 3, [torch.randn(D, 5)] * 3
B1, B2 = [torch.randn(10)] * 3, [torch.randn(D)] * 3
OFFSETS = torch.tensor([0, 3, 3, 8])
MLP = {
    "x must have shape (rows, D)": (Y[0], OFFSETS, W1, W2, [], []),
    "x must be of type": (Y.half(), OFFSETS, W1, W2, [], []),
    "offsets must have shape (E + 1,)": (Y, OFFSETS[None], W1, W2, [], []),
    "offsets must be of type int64": (Y, OFFSETS.int(), W1, W2, [], []),
    "offsets must have 4 entries": (Y, OFFSETS[:3], W1, W2, [], []),
    "w1 must hold one tensor an expert": (Y, OFFSETS, [], [], [], []),
    "w2 holds 2 tensors, but w1 holds 3": (Y, OFFSETS, W1, W2[:2], [], []),
    "b1 holds 1 tensors": (Y, OFFSETS, W1, W2, B1[:1], []),
    "w1 of expert 0 must have shape (10, 6), but has (5, 6)": (Y, OFFSETS, [W1[0][:5]] * 3, W2, [], []),
    "w2 of expert 1 must have shape (6, 5)": (Y, OFFSETS, W1, [W2[0], W2[0][:4], W2[0]], [], []),
    "b2 of expert 0 must have shape (6,)": (Y, OFFSETS, W1, W2, B1, B1),
    "w1 of expert 2 must be of type float32, but is float64": (Y, OFFSETS, [*W1[:2], W1[0].double()], W2, [], []),
    "offsets is on meta": (Y, OFFSETS.to("meta"), W1, W2, [], []),
}
FFN = {
    "gates must have shape (T, K)": (X, GATES[0], EXPERTS, W1, W2, [], []),
    "experts must be of type int32, int64, but is int16": (X, GATES, EXPERTS.short(), W1, W2, [], []),
    "experts must have 4 entries along T": (X, GATES, EXPERTS[:3], W1, W2, [], []),
    "gates must have 2 entries along K": (X, GATES[:, :1], EXPERTS, W1, W2, [], []),
    "w1 of expert 0 must have shape": (X[:, :5], GATES, EXPERTS, W1, W2, [], []),
    "gates is on meta": (X, GATES.to("meta"), EXPERTS, W1, W2, [], []),
    "residual must have 4 entries along T": (X, GATES, EXPERTS, W1, W2, [], [], Y),
    "residual must be of type float32, but is bfloat16": (X, GATES, EXPERTS, W1, W2, [], [], X.bfloat16()),
}
OPTIONS = {"plan": {"num_experts": 3}, "route_topk": {"top_k": 2, "kind": "softmax", "renormalise": False}}
OPTIONS |= {op: {"activation": "swiglu", "recompute": False} for op in ("grouped_mlp", "moe_ffn")}
CALLS = [("plan", text, given) for text, given in PLAN.items()]
CALLS += [("route_topk", text, given) for text, given in ROUTE.items()]
CALLS += [("grouped_mlp", text, given) for text, given in MLP.items()]
CALLS += [("moe_ffn", text, given) for text, given in FFN.items()]
CALLS += [("permute", text, given) for text, given in PERMUTE.items()]
CALLS += [("combine", text, given) for text, given in COMBINE.items()]
ON_CPU = [call for call in CALLS if "on meta" not in call[1]]  # a call with a meta tensor only computes shapes


@pytest.mark.parametrize(("op", "text", "given"), CALLS, ids=[f"{op}: {text}" for op, text, _ in CALLS])
def test_shape_type_and_device(op: str, text: str, given: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(KernelError) as error:
        getattr(ops, op)(*given, **OPTIONS.get(op, {}))
    assert text in str(error.value) and str(error.value).startswith(f"{op}: ")


@pytest.mark.skipif(not COMPILED, reason="moemm._C is not built")
@pytest.mark.parametrize(("op", "text", "given"), ON_CPU, ids=[f"{op}: {text}" for op, text, _ in ON_CPU])
def test_direct_calls_are_refused_too(op: str, text: str, given: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(RuntimeError):
        getattr(torch.ops.moemm, op)(*given, **OPTIONS.get(op, {}))


@pytest.mark.parametrize("value", [-(2**31), -3, -2, T * K, T * K + 1, 2**31 - 1])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("position", [0, 5, T * K - 1])
def test_index_out_of_range(value: int, index: torch.dtype, position: int) -> None:
    order_R, inverse_TK = ORDER.to(index, copy=True), INVERSE.to(index, copy=True)
    order_R[position] = value
    inverse_TK.view(-1)[position] = value
    with pytest.raises(IndexError):
        ops.permute(X, order_R, INVERSE.to(index))
    with pytest.raises(IndexError):
        ops.combine(Y, inverse_TK, GATES)


@pytest.mark.skipif(not COMPILED, reason="moemm._C is not built")
def test_index_errors_name_argument_value_and_place() -> None:
    inverse_TK = INVERSE.clone()
    inverse_TK[1, 1] = 77
    message = "inverse holds 77 at flat position 3; allowed is 0 to 7, or -1 for none"
    with pytest.raises(IndexError, match=message):
        ops.combine(Y, inverse_TK, GATES)
    with pytest.raises(IndexError, match=message):
        torch.ops.moemm.permute_backward(Y, ORDER, inverse_TK)
    with pytest.raises(IndexError, match=message):
        torch.ops.moemm.combine_backward(X, Y, inverse_TK, GATES)


@pytest.mark.skipif(not COMPILED, reason="moemm._C is not built")
def test_a_row_named_twice_is_refused_in_the_backward_pass() -> None:
    inverse_TK = torch.zeros_like(INVERSE)
    out_TD = ops.combine(Y.clone().requires_grad_(), inverse_TK, GATES)
    with pytest.raises(IndexError, match="inverse names row 0 twice"):
        out_TD.sum().backward()


@pytest.mark.parametrize("value", [-(2**31), -2, 3, 2**31 - 1])
def test_expert_id_or_modality_out_of_range(value: int) -> None:
    experts_TK, modality_T = EXPERTS.clone(), MODALITY.clone()
    experts_TK[1, 1] = modality_T[2] = value
    with pytest.raises(IndexError):
        ops.plan(experts_TK, num_experts=3)
    with pytest.raises(IndexError):
        ops.route_topk(LOGITS, modality_T, ALLOWED, top_k=1)


def test_plan_and_router_without_experts() -> None:
    with pytest.raises(KernelError, match="num_experts must be at least 1, but is 0"):
        ops.plan(EXPERTS, num_experts=0)
    with pytest.raises(KernelError, match="alignment must be at least 1, but is 0"):
        ops.plan(EXPERTS, num_experts=3, alignment=0)
    with pytest.raises(KernelError, match="kind must be softmax or sigmoid, but is argmax"):
        ops.route_topk(LOGITS, MODALITY, ALLOWED, top_k=1, kind="argmax")  # type: ignore[arg-type]


@pytest.mark.parametrize(("index", "alignment"), [(torch.int32, 2**30), (torch.int64, 2**62)])
def test_rows_of_a_plan_that_cannot_be_counted(index: torch.dtype, alignment: int) -> None:
    experts_TK = EXPERTS.to(index)
    with pytest.raises(KernelError, match=r"the plan has \d+ rows, but experts can number at most"):
        ops.plan(experts_TK, num_experts=3, alignment=alignment)
    if COMPILED:
        with pytest.raises(RuntimeError, match="cannot be counted"):
            torch.ops.moemm.plan(experts_TK, num_experts=3, alignment=alignment)


@pytest.mark.skipif(not COMPILED, reason="moemm._C is not built")
def test_a_direct_call_of_plan_refuses_alignment_zero() -> None:
    with pytest.raises(RuntimeError, match="alignment must be at least 1, but is 0"):
        torch.ops.moemm.plan(EXPERTS, num_experts=3, alignment=0)


def test_a_token_without_an_allowed_expert_is_an_error() -> None:
    allowed_ME = ALLOWED.clone()
    allowed_ME[1] = False
    ops.route_topk(LOGITS, MODALITY, allowed_ME, top_k=2)
    with pytest.raises(ValueError, match="allowed has no expert"):
        ops.route_topk(LOGITS, MODALITY + 1, allowed_ME, top_k=2)


def test_unknown_activation() -> None:
    with pytest.raises(KernelError, match="activation must be gelu, relu2 or swiglu, but is tanh"):
        ops.moe_ffn(X, GATES, EXPERTS, W1, W2, activation="tanh")  # type: ignore[arg-type]


@pytest.mark.parametrize("offsets", [[1, 3, 3, 8], [0, 3, 3, 9], [0, 5, 3, 8], [0, -1, 3, 8], [0, 2**40, 3, 8]])
def test_offsets_out_of_range(offsets: list[int]) -> None:
    with pytest.raises(IndexError):
        ops.grouped_mlp(Y, torch.tensor(offsets), W1, W2, activation="swiglu")


@pytest.mark.parametrize("value", [-2, 3, 2**40])
def test_expert_id_of_the_layer_out_of_range(value: int) -> None:
    experts_TK = EXPERTS.clone()
    experts_TK[2, 1] = value
    with pytest.raises(IndexError):
        ops.moe_ffn(X, GATES, experts_TK, W1, W2, activation="swiglu")
