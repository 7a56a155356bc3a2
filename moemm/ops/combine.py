"""combine: each token's output as the gated sum of the rows that its experts made.

T tokens, D width, K slots a token, R rows.
"""

from __future__ import annotations

from typing import Any

import torch

from moemm.ops import check, reference
from moemm.ops.backend import COMPILED

Pair = tuple[torch.Tensor, torch.Tensor]


def combine(
    y_RD: torch.Tensor,
    inverse_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """out[t] = residual[t] + sum over k of gates[t, k] * y[inverse[t, k]]: (R, D) -> (T, D).

    y_RD: (R, D) float32, float64 or bfloat16; rows may lie apart.
    inverse_TK: (T, K) int32 or int64, the row of each slot; -1: dropped, the slot adds nothing and its gate's gradient
        is zero, whatever the gate. No row may be named twice (checked in the backward pass on the CPU).
    gates_TK: (T, K) of y's type, or float32 where y is bfloat16.
    residual_TD: (T, D) of y's type, added in the same pass; rows may lie apart. None: nothing. Its gradient is dout.

    Sums are kept in at least float32, the residual first, then in the order of k, and rounded once. One backward pass
    makes both other gradients: dy[r] = gate * dout and dgate = <dout, y[r]>; rows that no slot names get zeros.

    Raises KernelError for wrong shapes, types or devices, IndexError for an index out of range (CPU; on CUDA the kernel
    traps).
    """
    check.weighted("combine", y_RD, inverse_TK, gates_TK)
    check.residual("combine", residual_TD, inverse_TK.shape[0], y_RD)
    function = torch.ops.moemm.combine if COMPILED else reference.combine
    return function(y_RD, inverse_TK, gates_TK, residual_TD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, residual_TD = inputs
    ctx.save_for_backward(*tensors)
    ctx.has_residual = residual_TD is not None


def _backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dy_RD, dgates_TK = torch.ops.moemm.combine_backward(grad_TD, *ctx.saved_tensors)
    return dy_RD, None, dgates_TK, grad_TD if ctx.has_residual else None


def _save_backward(ctx: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, ddy_RD: torch.Tensor, ddgates_TK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Derivatives of dy = gates * grad and dgates = <grad, y>: the same two ops again."""
    grad_TD, y_RD, inverse_TK, gates_TK = ctx.saved_tensors
    forward, backward = torch.ops.moemm.combine, torch.ops.moemm.combine_backward
    dgrad_TD = forward(y_RD, inverse_TK, ddgates_TK, forward(ddy_RD, inverse_TK, gates_TK))
    dy_RD, dgates_TK = backward(grad_TD, ddy_RD, inverse_TK, ddgates_TK)
    return dgrad_TD, dy_RD, None, dgates_TK


def _fake(y_RD: torch.Tensor, inverse_TK: torch.Tensor, gates: Any, residual: Any = None) -> torch.Tensor:
    return y_RD.new_empty(inverse_TK.shape[0], y_RD.shape[1])


def _fake_backward(grad_TD: torch.Tensor, y_RD: torch.Tensor, inverse_TK: torch.Tensor, gates_TK: torch.Tensor) -> Pair:
    return y_RD.new_empty(y_RD.shape), gates_TK.new_empty(gates_TK.shape)


if COMPILED:
    torch.library.register_fake("moemm::combine", _fake)
    torch.library.register_fake("moemm::combine_backward", _fake_backward)
    torch.library.register_autograd("moemm::combine", _backward, setup_context=_save)
    torch.library.register_autograd("moemm::combine_backward", _double_backward, setup_context=_save_backward)
