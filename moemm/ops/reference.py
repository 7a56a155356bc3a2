"""The ops in plain PyTorch: what tests hold the compiled ones against, and what runs where those are not built.

T tokens, D width, K slots a token, R rows, E experts, F hidden width. Indices are checked by index_select: permute and
combine shift them by one, onto a table whose first row is zeros, so that -1 (none) reads zeros and anything else out of
range is an IndexError.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from moemm.ops import check

Tensors = tuple[torch.Tensor, ...]


LANES = 16
"""Columns of which torch's softmax makes whole vectors, on every processor."""


def even_softmax(logits_TE: torch.Tensor) -> torch.Tensor:
    """Softmax over experts whose bits do not change where columns of -inf are added behind; (T, E) -> (T, E).

    torch sums a row by vectors and what is left of them, so that its last bits depend on E.
    """
    num = logits_TE.shape[1]
    return F.pad(logits_TE, (0, -num % LANES), value=-torch.inf).softmax(-1)[:, :num]


def route_topk(
    logits_TE: torch.Tensor,
    modality_T: torch.Tensor,
    allowed_ME: torch.Tensor,
    bias_E: torch.Tensor | None = None,
    *,
    top_k: int,
    kind: str,
    renormalise: bool,
) -> Tensors:
    """gates_TK, experts_TK, load_ME, prob_ME, z_M, tokens_M; see moemm.ops.route_topk."""
    if not allowed_ME.any(1)[modality_T].all():
        raise ValueError("route_topk: a token is of a modality for which allowed has no expert")
    allowed_TE = allowed_ME[modality_T]
    exact = torch.promote_types(logits_TE.dtype, torch.float32)
    logits_TE = logits_TE.to(exact).masked_fill(~allowed_TE, -torch.inf)
    score_TE = even_softmax(logits_TE) if kind == "softmax" else torch.sigmoid(logits_TE)
    key_TE = logits_TE if bias_E is None else score_TE + bias_E.to(exact)
    key_TE = key_TE.detach().nan_to_num(nan=torch.finfo(exact).min).masked_fill(~allowed_TE, -torch.inf)
    experts_TK = key_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    found_TK = allowed_TE.gather(1, experts_TK)
    gates_TK = score_TE.gather(1, experts_TK).masked_fill(~found_TK, 0.0)
    if renormalise:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    chosen_TE = torch.zeros_like(score_TE).scatter(1, experts_TK, found_TK.to(exact))
    member_MT = (modality_T == torch.arange(allowed_ME.shape[0], device=modality_T.device)[:, None]).to(exact)
    share_TE = score_TE / score_TE.sum(-1, keepdim=True)
    sums = (member_MT @ chosen_TE.detach(), member_MT @ share_TE, member_MT @ torch.logsumexp(logits_TE, -1).square())
    return gates_TK, experts_TK.masked_fill(~found_TK, -1), *sums, member_MT.sum(1)


def plan(experts_TK: torch.Tensor, *, num_experts: int, alignment: int = 1) -> Tensors:
    """counts_E, offsets_E1, order_R, inverse_TK; see moemm.ops.plan. S = T K slots."""
    flat_S = experts_TK.flatten()
    if ((flat_S < -1) | (flat_S >= num_experts)).any():
        raise IndexError(f"plan: experts holds an id out of range; allowed is 0 to {num_experts - 1}, or -1 for none")
    flat_S = flat_S.long()
    slots_S = flat_S.argsort(stable=True)[(flat_S < 0).sum() :]  # those of no expert come first
    expert_S = flat_S[slots_S]
    counts_E = torch.bincount(expert_S, minlength=num_experts)
    ends_E = (counts_E + alignment - 1).div(alignment, rounding_mode="floor").mul(alignment).cumsum(0)
    offsets_E1 = torch.cat([ends_E.new_zeros(1), ends_E])
    rank_S = torch.arange(len(slots_S), device=flat_S.device) - (counts_E.cumsum(0) - counts_E)[expert_S]
    rows_S = offsets_E1[expert_S] + rank_S
    order_R = flat_S.new_full((check.plan_rows(flat_S.numel(), num_experts, alignment),), -1)
    order_R[rows_S] = slots_S
    inverse_S = torch.full_like(flat_S, -1)
    inverse_S[slots_S] = rows_S
    return counts_E, offsets_E1, order_R.to(experts_TK.dtype), inverse_S.to(experts_TK.dtype).view_as(experts_TK)


def permute(x_TD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    """Rows of x in the order of a plan: (T, D) -> (R, D); see moemm.ops.permute."""
    num_slots = inverse_TK.shape[1]
    token_R = torch.where(order_R < 0, order_R, order_R.div(num_slots, rounding_mode="floor"))
    exact = torch.promote_types(x_TD.dtype, torch.float32)  # of the backward pass: it sums a token's rows
    return _take(x_TD.to(exact), token_R).to(x_TD.dtype)


def combine(
    y_RD: torch.Tensor,
    inverse_TK: torch.Tensor,
    gates_TK: torch.Tensor,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token's rows, weighted and summed: (R, D) -> (T, D); see moemm.ops.combine."""
    exact = torch.promote_types(y_RD.dtype, torch.float32)
    rows_TKD = _take(y_RD, inverse_TK.flatten()).view(*inverse_TK.shape, y_RD.shape[1])
    gates_TK = gates_TK.masked_fill(inverse_TK < 0, 0.0)
    sum_TD = (rows_TKD.to(exact) * gates_TK.to(exact).unsqueeze(-1)).sum(dim=1)
    return (sum_TD if residual_TD is None else residual_TD.to(exact) + sum_TD).to(y_RD.dtype)


def relu2(x: torch.Tensor) -> torch.Tensor:
    """Squared ReLU (Primer, arXiv:2109.08668)."""
    return F.relu(x).square()


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half times the second (arXiv:2002.05202): (N, 2F) -> (N, F)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu2": relu2, "swiglu": swiglu}


def grouped_mlp(
    x_RD: torch.Tensor,
    offsets_E1: torch.Tensor,
    w1: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    b1: Sequence[torch.Tensor] = (),
    b2: Sequence[torch.Tensor] = (),
    *,
    activation: str,
    recompute: bool = False,
) -> torch.Tensor:
    """A loop over experts: (R, D) -> (R, D); see moemm.ops.grouped_mlp. `recompute` changes no value."""
    bounds = offsets_E1.tolist()
    if bounds[0] != 0 or bounds[-1] > x_RD.shape[0] or sorted(bounds) != bounds:
        raise IndexError(f"grouped_mlp: offsets must rise from 0 to at most {x_RD.shape[0]}, but are {bounds}")
    parts = []
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        z = F.linear(x_RD[begin:end], w1[e], b1[e] if b1 else None)
        parts.append(F.linear(ACTIVATIONS[activation](z), w2[e], b2[e] if b2 else None))
    return torch.cat([*parts, torch.zeros_like(x_RD[bounds[-1] :])])


def moe_ffn(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    w1: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    b1: Sequence[torch.Tensor] = (),
    b2: Sequence[torch.Tensor] = (),
    residual_TD: torch.Tensor | None = None,
    *,
    activation: str,
    recompute: bool = False,
) -> torch.Tensor:
    """plan, permute, grouped_mlp and combine, one after another; see moemm.ops.moe_ffn."""
    _, offsets_E1, order_R, inverse_TK = plan(experts_TK, num_experts=len(w1))
    y_RD = grouped_mlp(permute(x_TD, order_R, inverse_TK), offsets_E1, w1, w2, b1, b2, activation=activation)
    return combine(y_RD, inverse_TK, gates_TK, residual_TD)


def _take(table_ND: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """Rows of the table; zeros for -1."""
    padded = torch.cat([table_ND.new_zeros(1, table_ND.shape[1]), table_ND])
    return padded.index_select(0, index_R + 1)
