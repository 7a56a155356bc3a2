"""moe_ffn: from tokens and their gates to the layer's output as one call.

T tokens, D width, K slots a token, E experts, F hidden width, H rows of w1: 2F for swiglu, else F.
"""

from __future__ import annotations

from typing import Any

import torch

from moemm.ops import check
from moemm.ops.backend import COMPILED, refuse_second_derivative
from moemm.ops.combine import combine
from moemm.ops.grouped_mlp import ALIGNMENT, Activation, Weights, grouped_mlp, hidden_like, restore_lists, save_lists
from moemm.ops.permute import permute
from moemm.ops.plan import plan


def moe_ffn(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    w1: Weights,
    w2: Weights,
    b1: Weights = (),
    b2: Weights = (),
    residual_TD: torch.Tensor | None = None,
    *,
    activation: Activation,
    recompute: bool = False,
) -> torch.Tensor:
    """out[t] = residual[t] + sum over k of gates[t, k] * expert[experts[t, k]](x[t]): (T, D) -> (T, D).

    The same as plan, permute, grouped_mlp and combine, whose arguments these are, without what need not exist: on the
    CPU rows are gathered a tile at a time, and neither the experts' outputs nor the permuted rows are kept. A slot with
    id -1 adds nothing, and its gate's gradient is zero. The CPU has no second derivative: asking for one is a
    KernelError.

    Raises KernelError for wrong shapes, types or devices, IndexError for an id out of range (CPU; on CUDA the kernel
    traps).
    """
    check.mlp("moe_ffn", x_TD, w1, w2, b1, b2, activation)
    check.experts("moe_ffn", experts_TK, len(w1), ALIGNMENT)
    check.slots("moe_ffn", x_TD, gates_TK, experts_TK)
    check.residual("moe_ffn", residual_TD, x_TD.shape[0], x_TD)
    if COMPILED and not x_TD.is_cuda:
        lists = [list(one) for one in (w1, w2, b1, b2)]
        options: dict[str, Any] = {"activation": activation, "recompute": recompute}
        out_TD, _ = torch.ops.moemm.moe_ffn(x_TD, gates_TK, experts_TK, *lists, residual_TD, **options)
        return out_TD
    made = plan(experts_TK, num_experts=len(w1))
    x_RD = permute(x_TD, made.order_R, made.inverse_TK)
    y_RD = grouped_mlp(x_RD, made.offsets_E1, w1, w2, b1, b2, activation=activation, recompute=recompute)
    return combine(y_RD, made.inverse_TK, gates_TK, residual_TD)


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x_TD, gates_TK, experts_TK, *lists, residual_TD = inputs
    activation = keyword_only_inputs["activation"]
    save_lists(ctx, output[1], (x_TD, gates_TK, experts_TK), lists, activation=activation)
    ctx.has_residual = residual_TD is not None


def _backward(ctx: Any, grad_TD: torch.Tensor | None, _hidden: Any) -> tuple[Any, ...]:
    tensors, lists = restore_lists(ctx)
    if grad_TD is None:
        return (None, None, None, *([None] * len(one) for one in lists), *([None] if ctx.has_residual else []))
    dx_TD, dgates_TK, *grads = torch.ops.moemm.moe_ffn_backward(grad_TD, *tensors, *lists, activation=ctx.activation)
    # The dispatcher leaves out a last argument that has its default, and torch wants as many gradients as arguments.
    return dx_TD, dgates_TK, None, *grads, *([grad_TD] if ctx.has_residual else [])


def _fake(
    x_TD: torch.Tensor, gates: Any, experts_TK: torch.Tensor, w1: Weights, *_: Any, activation: str, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_TD.new_empty(x_TD.shape), hidden_like(x_TD, experts_TK.numel(), w1, recompute=recompute)


def _fake_backward(
    grad: Any, z: Any, x_TD: torch.Tensor, gates_TK: torch.Tensor, experts: Any, *lists: Weights, activation: str
) -> tuple[Any, ...]:
    grads = ([tensor.new_empty(tensor.shape) for tensor in one] for one in lists)
    return x_TD.new_empty(x_TD.shape), gates_TK.new_empty(gates_TK.shape), *grads


if COMPILED:
    torch.library.register_fake("moemm::moe_ffn", _fake)
    torch.library.register_fake("moemm::moe_ffn_backward", _fake_backward)
    torch.library.register_autograd("moemm::moe_ffn", _backward, setup_context=_save)
    refuse_second_derivative("moe_ffn")
