"""grouped_mlp: every expert's network over its own rows, w2 act(w1 x).

R rows, D width, F hidden width (of each expert its own), E experts, H rows of w1: 2F for swiglu, else F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F

from moemm.ops import check, reference
from moemm.ops.backend import COMPILED, refuse_second_derivative

Activation = Literal["gelu", "relu2", "swiglu"]
Weights = Sequence[torch.Tensor]

ALIGNMENT = 16
"""Rows that each expert's part of the kept pre-activations is rounded up to (kAlignment in csrc/cpu/experts.h)."""


def grouped_mlp(
    x_RD: torch.Tensor,
    offsets_E1: torch.Tensor,
    w1: Weights,
    w2: Weights,
    b1: Weights = (),
    b2: Weights = (),
    *,
    activation: Activation,
    recompute: bool = False,
) -> torch.Tensor:
    """(R, D) -> (R, D): rows offsets[e] to offsets[e + 1] pass through expert e; rows after the last expert give zeros.

    x_RD: (R, D) float32, float64 or bfloat16; rows may lie apart.
    offsets_E1: (E + 1,) int64, from 0, not decreasing; see plan.
    w1, w2: one tensor an expert, (H, D) and (D, F), of x's type; F may differ from expert to expert. For swiglu the
        first half of w1's rows makes the gate. b1, b2: (H,) and (D,), or empty.
    recompute: compute the pre-activations again in the backward pass instead of keeping them.

    The CPU keeps x and the pre-activations (R, H) for the backward pass, no more. On CUDA torch's grouped products run
    where weights allow (bfloat16, equal widths, no bias, rows of a multiple of 16 bytes), else a loop of products, and
    torch's autograd decides what is kept. The CPU has no second derivative: asking for one is a KernelError.

    Raises KernelError for wrong shapes, types or devices, IndexError for offsets out of range (CPU).
    """
    check.mlp("grouped_mlp", x_RD, w1, w2, b1, b2, activation)
    check.offsets("grouped_mlp", offsets_E1, len(w1), x_RD)
    if COMPILED and not x_RD.is_cuda:
        lists = [list(one) for one in (w1, w2, b1, b2)]
        y_RD, _ = torch.ops.moemm.grouped_mlp(x_RD, offsets_E1, *lists, activation=activation, recompute=recompute)
        return y_RD
    if x_RD.is_cuda and 0 < x_RD.shape[0] < 2**31 and can_group(w1, w2, b1, b2):  # grouped_mm's offsets are int32
        return grouped_products(x_RD, offsets_E1, w1, w2, activation=activation)
    return reference.grouped_mlp(x_RD, offsets_E1, w1, w2, b1, b2, activation=activation)


def can_group(w1: Weights, w2: Weights, b1: Weights, b2: Weights) -> bool:
    """Whether torch's grouped products take these weights."""
    equal = len({one.shape for one in w1}) == 1 and len({one.shape for one in w2}) == 1
    narrow = w1[0].dtype == torch.bfloat16 and w1[0].shape[1] % 8 == 0 and w2[0].shape[1] % 8 == 0
    return equal and narrow and not b1 and not b2


def grouped_products(
    x_RD: torch.Tensor, offsets_E1: torch.Tensor, w1: Weights, w2: Weights, *, activation: Activation
) -> torch.Tensor:
    """The same by torch's grouped_mm, without a word from device to host. Rows of no expert are left unwritten by
    grouped_mm, so they are masked, and so are their gradients.
    """
    ends_E = offsets_E1[1:].int()
    valid_R1 = (torch.arange(x_RD.shape[0], device=x_RD.device) < ends_E[-1]).unsqueeze(1)

    def product(rows: torch.Tensor, weights: Weights) -> torch.Tensor:
        stacked = torch.stack(list(weights)).transpose(-2, -1)
        return F.grouped_mm(rows, stacked, offs=ends_E).masked_fill(~valid_R1, 0.0)

    # grouped_mm takes transposed rows only where their number is a multiple of 8.
    dense_RD = x_RD.contiguous().masked_fill(~valid_R1, 0.0)
    return product(reference.ACTIVATIONS[activation](product(dense_RD, w1)), w2)


def save_lists(
    ctx: Any, hidden: torch.Tensor, tensors: Sequence[torch.Tensor], lists: Sequence[Weights], *, activation: str
) -> None:
    """Saves for restore_lists: the pre-activations (an output without a gradient), tensors, four lists of weights."""
    ctx.sizes, ctx.activation = [len(one) for one in lists], activation
    ctx.save_for_backward(hidden, *tensors, *(tensor for one in lists for tensor in one))
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)  # or the hidden rows would get a gradient of zeros as large as they are


def restore_lists(ctx: Any) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """What save_lists saved: the pre-activations and the tensors, and the lists."""
    saved = list(ctx.saved_tensors)
    count = len(saved) - sum(ctx.sizes)
    tensors, rest, lists = saved[:count], saved[count:], []
    for size in ctx.sizes:
        lists.append(rest[:size])
        rest = rest[size:]
    return tensors, lists


def hidden_like(x: torch.Tensor, num_rows: int, w1: Weights, *, recompute: bool) -> torch.Tensor:
    """The pre-activations that the forward pass keeps: shape only."""
    rows = 0 if recompute else num_rows + (ALIGNMENT - 1) * len(w1)
    return x.new_empty(rows, max(one.shape[0] for one in w1))


def _save(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    x_RD, offsets_E1, *lists = inputs
    save_lists(ctx, output[1], (x_RD, offsets_E1), lists, activation=keyword_only_inputs["activation"])


def _backward(ctx: Any, grad_RD: torch.Tensor | None, _hidden: Any) -> tuple[Any, ...]:
    tensors, lists = restore_lists(ctx)
    if grad_RD is None:
        return (None, None, *([None] * len(one) for one in lists))
    dx_RD, *grads = torch.ops.moemm.grouped_mlp_backward(grad_RD, *tensors, *lists, activation=ctx.activation)
    return dx_RD, None, *grads


def _fake(
    x_RD: torch.Tensor, offsets: Any, w1: Weights, *_: Any, activation: str, recompute: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x_RD.new_empty(x_RD.shape), hidden_like(x_RD, x_RD.shape[0], w1, recompute=recompute)


def _fake_backward(
    grad_RD: torch.Tensor, _z: Any, x_RD: torch.Tensor, _offsets: Any, *lists: Weights, activation: str
) -> tuple[Any, ...]:
    return x_RD.new_empty(x_RD.shape), *([tensor.new_empty(tensor.shape) for tensor in one] for one in lists)


if COMPILED:
    torch.library.register_fake("moemm::grouped_mlp", _fake)
    torch.library.register_fake("moemm::grouped_mlp_backward", _fake_backward)
    torch.library.register_autograd("moemm::grouped_mlp", _backward, setup_context=_save)
    refuse_second_derivative("grouped_mlp")
