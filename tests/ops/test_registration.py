"""What torch asks of an op: schema, autograd, fake kernel, compile and export; and exact derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moemm import ops
from moemm.errors import KernelError
from moemm.ops.backend import COMPILED
from moemm.testing.op_cases import MAKERS, NETWORKS, OpCase, tensors_of

needs_library = pytest.mark.skipif(not COMPILED, reason="moemm._C is not built")

SHAPES = [(0, 8, 2, 4), (6, 5, 3, 4)]
DIFFERENTIABLE = [op for op in MAKERS if op != "plan"]
Tensors = tuple[torch.Tensor, ...]


def make_case(op: str, shape: tuple[int, int, int, int], plan: str = "dropped") -> OpCase:
    return OpCase(op, shape, torch.float32, torch.int64, "dense", plan)


def backward_call(op: str) -> tuple[Tensors, dict[str, object]]:
    """Arguments and options of the op's backward op, which takes no residual."""
    case = make_case(op, SHAPES[1])
    given = case.arguments()
    outputs = tensors_of(getattr(ops, op)(*given, **case.options))
    grads = [torch.randn_like(out) for out in outputs if out.requires_grad]
    if op in NETWORKS:
        _, hidden = getattr(torch.ops.moemm, op)(*given, **case.options)
        count = 7 if op == "moe_ffn" else 6
        plain = [[one.detach() for one in part] if isinstance(part, list) else part.detach() for part in given[:count]]
        return (*grads, hidden.detach(), *plain), {"activation": case.options["activation"]}
    if op == "route_topk":
        kept = {name: value for name, value in case.options.items() if name != "top_k"}
        return (*grads, *(one.detach() for one in given[:3]), outputs[1]), kept
    grad = grads[0].requires_grad_()
    return ((grad, *given[1:]) if op == "permute" else (grad, *given[:3])), {}


@needs_library
@pytest.mark.parametrize("plan", ["full", "dropped"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_opcheck(op: str, shape: tuple[int, int, int, int], plan: str) -> None:
    """With plan "dropped" a plan is aligned, and combine and moe_ffn have a residual."""
    case = make_case(op, shape, plan)
    results = torch.library.opcheck(getattr(torch.ops.moemm, op).default, case.arguments(), case.options)
    assert list(results.values()) == ["SUCCESS"] * 4


@needs_library
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_opcheck_of_the_backward_op(op: str) -> None:
    overload = getattr(torch.ops.moemm, f"{op}_backward").default
    assert list(torch.library.opcheck(overload, *backward_call(op)).values()) == ["SUCCESS"] * 4


@pytest.mark.parametrize("plan", ["full", "dropped", "padded"])
@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str, plan: str) -> None:
    """Of both kinds of router, with biases and without; permute and combine to the second order."""
    for index in (torch.int64, torch.int32):
        case = OpCase(op, (4, 3, 2, 3), torch.float64, index, "dense", plan)
        given = case.arguments()

        flat, layout = torch.utils._pytree.tree_flatten(given)

        def function(*tensors: torch.Tensor, case: OpCase = case, layout: Any = layout) -> list[torch.Tensor]:
            arguments = torch.utils._pytree.tree_unflatten(tensors, layout)
            outputs = tensors_of(getattr(ops, case.op)(*arguments, **case.options))
            return [out for out in outputs if out.requires_grad]

        assert torch.autograd.gradcheck(function, flat)
        if op in ("permute", "combine"):
            assert torch.autograd.gradgradcheck(function, flat)


@needs_library
@pytest.mark.parametrize("op", ["route_topk", "grouped_mlp", "moe_ffn"])
def test_a_second_derivative_is_refused_and_the_reference_has_it(op: str) -> None:
    case = OpCase(op, (4, 3, 2, 3), torch.float64, torch.int64, "dense", "full")

    def penalty(module: Any) -> torch.Tensor:
        """Through the gradient of one argument alone: every path has to notice."""
        given = case.arguments()
        outputs = tensors_of(getattr(module, op)(*given, **case.options))
        total = sum(out.square().sum() for out in outputs if out.requires_grad)
        (grad,) = torch.autograd.grad(total, given[0], create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), given[0])
        return second

    with pytest.raises(KernelError, match=rf"{op} has no second derivative.*moemm\.ops\.reference\.{op}"):
        penalty(ops)
    assert penalty(ops.reference).abs().max() > 0


def dispatch(
    x_TD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor, gates_TK: torch.Tensor
) -> torch.Tensor:
    return ops.combine(ops.permute(x_TD, order_R, inverse_TK).sin(), inverse_TK, gates_TK)


def test_compiles_as_one_graph_with_changing_sizes() -> None:
    compiled = torch.compile(dispatch, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 12, 31):
        x_TD, order_R, inverse_TK = make_case("permute", (tokens, 8, 2, 4)).arguments()
        gates_TK = torch.rand(inverse_TK.shape, requires_grad=True)
        wanted = torch.autograd.grad(dispatch(x_TD, order_R, inverse_TK, gates_TK).sum(), (x_TD, gates_TK))
        given = torch.autograd.grad(compiled(x_TD, order_R, inverse_TK, gates_TK).sum(), (x_TD, gates_TK))
        assert all(torch.equal(a, b) for a, b in zip(wanted, given, strict=True))


class Dispatch(torch.nn.Module):
    def forward(self, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return dispatch(x, order, inverse, gates)


def test_exports() -> None:
    x_TD, order_R, inverse_TK = make_case("permute", (6, 8, 2, 4)).arguments()
    inputs = (x_TD.detach(), order_R, inverse_TK, torch.rand(inverse_TK.shape))
    exported = torch.export.export(Dispatch(), inputs).module()
    torch.testing.assert_close(exported(*inputs), dispatch(*inputs))


def huge(op: str, dtype: torch.dtype) -> tuple[Tensors, dict[str, Any], list[tuple[tuple[int, ...], torch.dtype]]]:
    """Arguments, options and outputs of a call with more than 2^31 elements in tokens, rows and logits each."""
    tokens, width, slots, experts = 2**20, 2**12, 3, 2**12
    rows, wide, ids = tokens * slots, torch.promote_types(dtype, torch.float32), torch.int64
    x_TD, y_RD = (torch.empty(count, width, dtype=dtype, requires_grad=True) for count in (tokens, rows))
    gates_TK = torch.empty(tokens, slots, dtype=wide, requires_grad=True)
    order_R, inverse_TK = torch.empty(rows, dtype=ids), torch.empty(tokens, slots, dtype=ids)
    offsets_E1, allowed_ME = torch.empty(3, dtype=ids), torch.empty(9, experts, dtype=torch.bool)
    weights = [
        [torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(2)]
        for shape in ((2**11, width), (width, 2**11), (2**11,), (width,))
    ]
    slots_of, per_pair, per_modality = ((tokens, slots), wide), ((9, experts), wide), ((9,), wide)
    return {
        "route_topk": (
            (x_TD, order_R[:tokens], allowed_ME),
            {"top_k": slots, "kind": "softmax", "renormalise": True},
            [slots_of, ((tokens, slots), ids), per_pair, per_pair, per_modality, per_modality],
        ),
        "plan": (
            (inverse_TK.expand(2**10, -1, -1).reshape(-1, slots),),
            {"num_experts": experts, "alignment": 16},
            [((experts,), ids), ((experts + 1,), ids), ((2**10 * rows + 15 * experts,), ids), ((2**30, slots), ids)],
        ),
        "permute": ((x_TD, order_R, inverse_TK), {}, [((rows, width), dtype)]),
        "combine": ((y_RD, inverse_TK, gates_TK, x_TD), {}, [((tokens, width), dtype)]),
        "grouped_mlp": ((y_RD, offsets_E1, *weights), {"activation": "gelu"}, [((rows, width), dtype)]),
        "moe_ffn": (
            (x_TD, gates_TK, inverse_TK, *weights, torch.empty_like(x_TD, requires_grad=True)),
            {"activation": "gelu"},
            [((tokens, width), dtype)],
        ),
    }[op]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", MAKERS)
def test_shapes_beyond_two_to_the_31_elements(op: str, dtype: torch.dtype) -> None:
    """Forward and backward, by fake tensors: sizes and types, without the memory."""
    with FakeTensorMode():
        given, options, wanted = huge(op, dtype)
        outputs = tensors_of(getattr(ops, op)(*given, **options))
        assert [(tuple(out.shape), out.dtype) for out in outputs] == wanted
        leaves = [one for one in tensors_of(given) if one.requires_grad]
        assert bool(leaves) == (op in DIFFERENTIABLE)
        assert max(one.numel() for one in (*outputs, *tensors_of(given))) > 2**31
        if leaves:
            differentiable = [out for out in outputs if out.requires_grad]
            grads = torch.autograd.grad(differentiable, leaves, [torch.ones_like(out) for out in differentiable])
            assert [(one.shape, one.dtype) for one in grads] == [(one.shape, one.dtype) for one in leaves]


@needs_library
def test_slots_that_int32_cannot_number_are_refused() -> None:
    experts_TK = torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1)
    with pytest.raises(KernelError, match=r"the plan has 2147483648 rows.*give int64 ids"):
        ops.plan(experts_TK, num_experts=3)
    with pytest.raises(RuntimeError, match="cannot be counted in Int"):
        torch.ops.moemm.plan(experts_TK, num_experts=3)
    with pytest.raises(KernelError, match="give int64 ids"):
        ops.moe_ffn(torch.zeros(1, 1).expand(2**31, 1), torch.zeros(1, 1).expand(2**31, 1), experts_TK,
                    [torch.zeros(1, 1)], [torch.zeros(1, 1)], activation="gelu")  # fmt: skip


@needs_library
def test_the_backward_pass_allocates_nothing_as_large_as_the_hidden_rows() -> None:
    """Autograd made a gradient of zeros for them, which nobody read."""
    tokens, width, hidden, experts = 512, 16, 192, 4
    x_TD = torch.randn(tokens, width, requires_grad=True)
    experts_TK = torch.randint(0, experts, (tokens, 1))
    w1, w2 = ([torch.randn(shape) for _ in range(experts)] for shape in ((hidden, width), (width, hidden)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out_TD = ops.moe_ffn(x_TD, torch.ones(tokens, 1), experts_TK, w1, w2, activation="gelu", recompute=False)
        out_TD.sum().backward()
    events = profile.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    large = [size for size in allocated if size >= 4 * tokens * hidden]
    assert len(large) == 3, "the hidden rows, and of a wave the gradients of them and the scaled activations"
