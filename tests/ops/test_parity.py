"""Every op against plain PyTorch in float64, over shapes, types, layouts and plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moemm import ops
from moemm.ops import backend_info, reference
from moemm.ops.grouped_mlp import can_group, grouped_products
from moemm.ops.route_topk import Kind
from moemm.testing.op_cases import LAYOUTS, MAKERS, SHAPES, OpCase, op_cases, tensors_of

CASES = list(op_cases())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_output_and_gradients(case: OpCase) -> None:
    case.check()


@pytest.mark.gpu
@pytest.mark.skipif(not (backend_info()["cuda"] and torch.cuda.is_available()), reason="no CUDA device or no CUDA ops")
@pytest.mark.parametrize("op", MAKERS)
def test_output_and_gradients_on_cuda(op: str) -> None:
    for case in op_cases(op):
        case.check("cuda")


def test_every_public_op_has_cases() -> None:
    assert set(MAKERS) == {name for name in ops.__all__ if name.islower()} - {"backend_info"}
    assert len(CASES) >= 500 * len(MAKERS)


@pytest.mark.parametrize("op", MAKERS)
def test_same_bits_twice_and_on_any_number_of_threads(op: str) -> None:
    case = OpCase(op, (700, 96, 4, 16), torch.float32, torch.int64, "dense", "full")
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 1, 2, 3):
            torch.set_num_threads(number)
            arguments = case.arguments()
            outputs = tensors_of(getattr(ops, op)(*arguments, **case.options))
            for out in (one for one in outputs if one.requires_grad):
                out.sin().sum().backward(retain_graph=True)
            grads = [one.grad for one in tensors_of(arguments) if one.grad is not None]
            results.append([*outputs, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_dropped_slots_ignore_their_gate() -> None:
    y_RD, inverse_TK = torch.ones(1, 3), torch.tensor([[0, -1]])
    gates_TK = torch.tensor([[0.5, float("nan")]], requires_grad=True)
    out_TD = ops.combine(y_RD, inverse_TK, gates_TK)
    out_TD.sum().backward()
    assert out_TD.tolist() == [[0.5, 0.5, 0.5]]
    assert gates_TK.grad is not None and gates_TK.grad.tolist() == [[3.0, 0.0]]


def test_a_residual_is_rounded_with_the_sum_and_its_gradient_is_the_output_s() -> None:
    """In bfloat16 1 + 2^-9 is 1: rounded before the residual is added, the small row would be lost."""
    y_RD = torch.tensor([[1.0], [2.0**-9]]).bfloat16()
    residual_TD = torch.full((1, 1), -1.0).bfloat16().requires_grad_()
    out_TD = ops.combine(y_RD, torch.tensor([[0, 1]]), torch.ones(1, 2), residual_TD)
    assert out_TD.item() == 2.0**-9
    out_TD.backward(torch.full((1, 1), 0.5).bfloat16())
    assert residual_TD.grad is not None and residual_TD.grad.item() == 0.5


def test_combine_undoes_permute() -> None:
    for shape in SHAPES:
        case = OpCase("permute", shape, torch.float64, torch.int64, "dense", "padded")
        x_TD, order_R, inverse_TK = case.arguments()
        gates_TK = torch.full(inverse_TK.shape, 1 / inverse_TK.shape[1], dtype=torch.float64)
        torch.testing.assert_close(ops.combine(ops.permute(x_TD, order_R, inverse_TK), inverse_TK, gates_TK), x_TD)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_nan_logits_give_distinct_allowed_ids(kind: Kind) -> None:
    logits_TE = torch.randn(6, 5)
    logits_TE[0], logits_TE[1, 3], logits_TE[2, 0] = torch.nan, torch.nan, torch.inf
    allowed_ME = torch.tensor([[True, True, False, True, True]])
    routed = ops.route_topk(logits_TE, torch.zeros(6, dtype=torch.int64), allowed_ME, top_k=4, kind=kind)
    assert routed.experts_TK.sort(1).values.tolist() == [[0, 1, 3, 4]] * 6


def test_equal_logits_take_the_lower_id_first() -> None:
    logits_TE = torch.zeros(3, 40)
    logits_TE[1, 7] = 1.0
    routed = ops.route_topk(logits_TE, torch.zeros(3, dtype=torch.int64), torch.ones(1, 40, dtype=torch.bool), top_k=3)
    assert routed.experts_TK.tolist() == [[0, 1, 2], [7, 0, 1], [0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("experts", [15, 16, 17, 31, 64, 130])
def test_many_experts_many_ties(experts: int, dtype: torch.dtype) -> None:
    """Widths around the kernel's 16 lanes; few distinct values, both zeros, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(experts)
    logits_TE = torch.randint(-3, 3, (60, experts), generator=generator).to(dtype) / 4
    logits_TE[logits_TE == 0] *= -1.0  # negative zeros ...
    logits_TE[torch.rand(60, experts, generator=generator) < 0.2] = 0.0  # ... equal the others
    logits_TE[:10][torch.rand(10, experts, generator=generator) < 0.2] = torch.nan
    logits_TE[10:20][torch.rand(10, experts, generator=generator) < 0.2] = -torch.inf
    logits_TE[20:30, experts // 2] = torch.inf
    allowed_ME = torch.rand(3, experts, generator=generator) < 0.7
    modality_T = torch.arange(60) % 3
    bias_E = torch.randn(experts, generator=generator)  # without ties: scores may differ in their last bit
    for top_k, bias in ((1, None), (5, None), (experts, None), (5, bias_E)):
        given = ops.route_topk(logits_TE, modality_T, allowed_ME, bias, top_k=top_k)
        options: dict[str, Any] = {"top_k": top_k, "kind": "softmax", "renormalise": False}
        wanted = reference.route_topk(logits_TE, modality_T, allowed_ME, bias, **options)
        assert torch.equal(given.experts_TK, wanted[1])
        torch.testing.assert_close(given.gates_TK, wanted[0], equal_nan=True)
        torch.testing.assert_close(given.prob_ME, wanted[3], equal_nan=True)


def test_plan_is_a_stable_sort_and_its_inverse() -> None:
    experts_TK = torch.randint(0, 5, (30_000, 2), generator=torch.Generator().manual_seed(0))
    flat, plan = experts_TK.flatten(), ops.plan(experts_TK, num_experts=7)
    assert torch.equal(plan.counts_E, torch.bincount(flat, minlength=7))
    assert torch.equal(plan.offsets_E1.diff(), plan.counts_E)
    assert torch.equal(plan.order_R, flat.argsort(stable=True))
    assert torch.equal(plan.order_R[plan.inverse_TK.flatten()], torch.arange(60_000))


@pytest.mark.parametrize("alignment", [1, 2, 3, 7, 16, 100])
def test_an_aligned_plan_pads_each_group_and_changes_no_output(alignment: int) -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.randint(-1, 6, (41, 2), generator=generator)
    experts_TK[experts_TK == 3] = 2  # an expert without slots has no rows
    x_TD = torch.randn(41, 8, generator=generator, requires_grad=True)
    gates_TK = torch.rand(41, 2, generator=generator)
    w1, w2 = ([torch.randn(shape, generator=generator) for _ in range(6)] for shape in ((10, 8), (8, 5)))
    b1, b2 = ([torch.randn(size, generator=generator).requires_grad_() for _ in range(6)] for size in (10, 8))
    made = ops.plan(experts_TK, num_experts=6, alignment=alignment)
    assert len(made.order_R) == 82 + (alignment - 1) * 6
    assert torch.equal(made.offsets_E1 % alignment, torch.zeros(7, dtype=torch.int64))
    assert made.counts_E[3] == made.offsets_E1.diff()[3] == 0
    x_RD = ops.permute(x_TD, made.order_R, made.inverse_TK)
    assert not x_RD[made.order_R < 0].any() and x_RD[made.order_R >= 0].all()
    y_RD = ops.grouped_mlp(x_RD, made.offsets_E1, w1, w2, b1, b2, activation="swiglu")
    wanted_TD = reference.moe_ffn(x_TD, gates_TK, experts_TK, w1, w2, b1, b2, activation="swiglu")
    leaves = (x_TD, *b1, *b2)
    given = [ops.combine(y_RD, made.inverse_TK, gates_TK)]
    given += torch.autograd.grad(given[0].square().sum(), leaves)
    wanted = [wanted_TD, *torch.autograd.grad(wanted_TD.square().sum(), leaves)]
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dropped", [False, True])
def test_torch_grouped_products_equal_the_loop(dropped: bool, layout: str) -> None:
    """What CUDA runs where weights allow, tried on the CPU."""
    case = OpCase("grouped_mlp", (33, 16, 1, 4), torch.bfloat16, torch.int64, layout, "dropped" if dropped else "full")
    generator = torch.Generator().manual_seed(0)
    w1, w2 = ([torch.randn(shape, generator=generator).bfloat16() for _ in range(4)] for shape in ((48, 16), (16, 24)))
    assert can_group(w1, w2, [], []) and not can_group(w1, w2, [w1[0][:, 0]] * 4, [])
    results = []
    for function in (grouped_products, reference.grouped_mlp):
        x_RD, offsets_E1, *_ = case.arguments()
        y_RD = function(x_RD, offsets_E1, w1, w2, activation="swiglu")
        y_RD.float().square().sum().backward()
        results.append((y_RD, x_RD.grad))
    for given, wanted in zip(*results, strict=True):
        torch.testing.assert_close(given, wanted, atol=0.05 * wanted.abs().max().item(), rtol=0.05)
