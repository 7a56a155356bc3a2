"""What ops demand of their arguments, in the words of the public functions. Reads shapes and types, never values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moemm.errors import KernelError

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
INDICES = (torch.int32, torch.int64)
Tensors = Sequence[torch.Tensor]


def rank(op: str, name: str, tensor: torch.Tensor, shape: str) -> None:
    """The tensor has as many dimensions as `shape`, "(T, D)" say."""
    if tensor.dim() != shape.count(",") + (not shape.endswith(",)")):
        raise KernelError(f"{op}: {name} must have shape {shape}, but has {tuple(tensor.shape)}")


def size(op: str, name: str, given: int, expected: int, what: str) -> None:
    """A dimension's size is the one that another argument fixes."""
    if given != expected:
        raise KernelError(f"{op}: {name} must have {expected} entries along {what}, but has {given}")


def dtype(op: str, name: str, tensor: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """The tensor's type is one of `allowed`."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(one).removeprefix("torch.") for one in allowed)
        raise KernelError(f"{op}: {name} must be of type {names}, but is {str(tensor.dtype).removeprefix('torch.')}")


def device(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    """The tensor is on the same device as the first argument."""
    if tensor.device != like.device:
        raise KernelError(
            f"{op}: {name} is on {tensor.device}, but the first argument is on {like.device}; move one of them"
        )


def plan(op: str, x_TD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor) -> None:
    """Arguments of permute."""
    rank(op, "x", x_TD, "(T, D)")
    rank(op, "order", order_R, "(R,)")
    rank(op, "inverse", inverse_TK, "(T, K)")
    dtype(op, "x", x_TD, FLOATS)
    dtype(op, "order", order_R, INDICES)
    dtype(op, "inverse", inverse_TK, (order_R.dtype,))
    size(op, "inverse", inverse_TK.shape[0], x_TD.shape[0], "T (the rows of x)")
    device(op, "order", order_R, x_TD)
    device(op, "inverse", inverse_TK, x_TD)
    if inverse_TK.shape[1] == 0:
        raise KernelError(f"{op}: inverse must have shape (T, K) with K >= 1, but has {tuple(inverse_TK.shape)}")


def weighted(op: str, y_RD: torch.Tensor, inverse_TK: torch.Tensor, gates_TK: torch.Tensor) -> None:
    """Arguments of combine."""
    rank(op, "y", y_RD, "(R, D)")
    rank(op, "inverse", inverse_TK, "(T, K)")
    rank(op, "gates", gates_TK, "(T, K)")
    dtype(op, "y", y_RD, FLOATS)
    dtype(op, "inverse", inverse_TK, INDICES)
    dtype(op, "gates", gates_TK, (y_RD.dtype, torch.float32) if y_RD.dtype == torch.bfloat16 else (y_RD.dtype,))
    size(op, "gates", gates_TK.shape[0], inverse_TK.shape[0], "T (the rows of inverse)")
    size(op, "gates", gates_TK.shape[1], inverse_TK.shape[1], "K (the columns of inverse)")
    device(op, "inverse", inverse_TK, y_RD)
    device(op, "gates", gates_TK, y_RD)


def residual(op: str, residual_TD: torch.Tensor | None, num_tokens: int, like: torch.Tensor) -> None:
    """What combine and moe_ffn add to their output."""
    if residual_TD is None:
        return
    rank(op, "residual", residual_TD, "(T, D)")
    dtype(op, "residual", residual_TD, (like.dtype,))
    size(op, "residual", residual_TD.shape[0], num_tokens, "T (the tokens of the output)")
    size(op, "residual", residual_TD.shape[1], like.shape[1], "D (the columns of the first argument)")
    device(op, "residual", residual_TD, like)


def experts(op: str, experts_TK: torch.Tensor, num_experts: int, alignment: int) -> None:
    """Arguments of plan, and experts of moe_ffn."""
    rank(op, "experts", experts_TK, "(T, K)")
    dtype(op, "experts", experts_TK, INDICES)
    for name, value in (("num_experts", num_experts), ("alignment", alignment)):
        if value < 1:
            raise KernelError(f"{op}: {name} must be at least 1, but is {value}")
    rows, largest = plan_rows(experts_TK.numel(), num_experts, alignment), torch.iinfo(experts_TK.dtype).max
    if rows > largest:
        more = "give int64 ids" if experts_TK.dtype == torch.int32 else "give a smaller alignment"
        raise KernelError(f"{op}: the plan has {rows} rows, but experts can number at most {largest}; {more}")


def plan_rows(num_slots: int, num_experts: int, alignment: int) -> int:
    """Rows of a plan, known before the counts are: padding for each expert that may have a slot."""
    return num_slots + (alignment - 1) * torch.sym_min(num_experts, num_slots)


def route(
    op: str,
    logits_TE: torch.Tensor,
    modality_T: torch.Tensor,
    allowed_ME: torch.Tensor,
    bias_E: torch.Tensor | None,
    top_k: int,
    kind: str,
) -> None:
    """Arguments of route_topk."""
    rank(op, "logits", logits_TE, "(T, E)")
    rank(op, "modality", modality_T, "(T,)")
    rank(op, "allowed", allowed_ME, "(M, E)")
    dtype(op, "logits", logits_TE, FLOATS)
    dtype(op, "modality", modality_T, (torch.int64,))
    dtype(op, "allowed", allowed_ME, (torch.bool,))
    num_experts = logits_TE.shape[1]
    size(op, "modality", modality_T.shape[0], logits_TE.shape[0], "T (the rows of logits)")
    size(op, "allowed", allowed_ME.shape[1], num_experts, "E (the columns of logits)")
    device(op, "modality", modality_T, logits_TE)
    device(op, "allowed", allowed_ME, logits_TE)
    if not 1 <= top_k <= num_experts:
        raise KernelError(f"{op}: top_k must be 1 to {num_experts} (the experts), but is {top_k}")
    if kind not in ("softmax", "sigmoid"):
        raise KernelError(f"{op}: kind must be softmax or sigmoid, but is {kind}")
    if bias_E is not None:
        rank(op, "bias", bias_E, "(E,)")
        dtype(op, "bias", bias_E, FLOATS)
        size(op, "bias", bias_E.shape[0], num_experts, "E (the columns of logits)")
        device(op, "bias", bias_E, logits_TE)


def offsets(op: str, offsets_E1: torch.Tensor, num_experts: int, like: torch.Tensor) -> None:
    """Offsets of grouped_mlp."""
    rank(op, "offsets", offsets_E1, "(E + 1,)")
    dtype(op, "offsets", offsets_E1, (torch.int64,))
    size(op, "offsets", offsets_E1.shape[0], num_experts + 1, "E + 1 (one more than experts in w1)")
    device(op, "offsets", offsets_E1, like)


def slots(op: str, x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> None:
    """Gates of moe_ffn, and how they and its experts fit x."""
    rank(op, "gates", gates_TK, "(T, K)")
    dtype(op, "gates", gates_TK, (x_TD.dtype, torch.float32) if x_TD.dtype == torch.bfloat16 else (x_TD.dtype,))
    size(op, "experts", experts_TK.shape[0], x_TD.shape[0], "T (the rows of x)")
    size(op, "gates", gates_TK.shape[0], x_TD.shape[0], "T (the rows of x)")
    size(op, "gates", gates_TK.shape[1], experts_TK.shape[1], "K (the columns of experts)")
    device(op, "gates", gates_TK, x_TD)
    device(op, "experts", experts_TK, x_TD)


def mlp(op: str, x: torch.Tensor, w1: Tensors, w2: Tensors, b1: Tensors, b2: Tensors, activation: str) -> None:
    """Rows and weights of grouped_mlp and moe_ffn."""
    rank(op, "x", x, "(rows, D)")
    dtype(op, "x", x, FLOATS)
    if activation not in ("gelu", "relu2", "swiglu"):
        raise KernelError(f"{op}: activation must be gelu, relu2 or swiglu, but is {activation}")
    if not w1:
        raise KernelError(f"{op}: w1 must hold one tensor an expert, but is empty")
    for name, weights in (("w2", w2), ("b1", b1), ("b2", b2)):
        if len(weights) != len(w1) and (weights or name == "w2"):
            raise KernelError(f"{op}: {name} holds {len(weights)} tensors, but w1 holds {len(w1)}; one an expert")
    for expert, matrix in enumerate(w2):
        rank(op, f"w2 of expert {expert}", matrix, "(D, F)")
        rows = matrix.shape[1] * (2 if activation == "swiglu" else 1)
        wanted = {"w1": (rows, x.shape[1]), "w2": (x.shape[1], matrix.shape[1]), "b1": (rows,), "b2": (x.shape[1],)}
        for name, weights in (("w1", w1), ("w2", w2), ("b1", b1), ("b2", b2)):
            if weights:
                _weight(op, f"{name} of expert {expert}", weights[expert], wanted[name], x)


def _weight(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise KernelError(f"{op}: {name} must have shape {shape}, but has {tuple(tensor.shape)}")
    dtype(op, name, tensor, (like.dtype,))
    device(op, name, tensor, like)
