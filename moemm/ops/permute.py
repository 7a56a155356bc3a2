"""permute: rows of the token stream in the order of a plan, so that each expert's rows lie together.

T tokens, D width, K slots a token, R rows.
"""

from __future__ import annotations

from typing import Any

import torch

from moemm.ops import check, reference
from moemm.ops.backend import COMPILED


def permute(x_TD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    """out[r] = x[order[r] // K]: (T, D) -> (R, D).

    x_TD: (T, D) float32, float64 or bfloat16; rows may lie apart.
    order_R: (R,) int32 or int64, the slot (token K + k) that each row takes its input from; -1: padding, a zero row.
    inverse_TK: (T, K) of the same type, the row that each slot went to; -1: dropped, no row. `order` and `inverse` must
        name each other (checked in debug builds): the backward pass sums a token's K rows through `inverse`, in the
        order of k, without atomics, so it is deterministic.

    Raises KernelError for wrong shapes, types or devices, IndexError for an index out of range (CPU; on CUDA the kernel
    traps).
    """
    check.plan("permute", x_TD, order_R, inverse_TK)
    if COMPILED:
        return torch.ops.moemm.permute(x_TD, order_R, inverse_TK)
    return reference.permute(x_TD, order_R, inverse_TK)


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad_RD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return torch.ops.moemm.permute_backward(grad_RD, *ctx.saved_tensors), None, None


def _double_backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """permute and its backward are adjoint, so each is the other's derivative."""
    return torch.ops.moemm.permute(grad_TD, *ctx.saved_tensors), None, None


def _fake(x_TD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    return x_TD.new_empty(order_R.shape[0], x_TD.shape[1])


def _fake_backward(grad_RD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    return grad_RD.new_empty(inverse_TK.shape[0], grad_RD.shape[1])


if COMPILED:
    torch.library.register_fake("moemm::permute", _fake)
    torch.library.register_fake("moemm::permute_backward", _fake_backward)
    torch.library.register_autograd("moemm::permute", _backward, setup_context=_save)
    torch.library.register_autograd("moemm::permute_backward", _double_backward, setup_context=_save)
