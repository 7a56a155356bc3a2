"""Other ways to run the experts of a layer, for comparison. T tokens, K slots a token, E experts."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from moemm import ops
from moemm.ops.reference import swiglu

Weights = list[torch.Tensor]


def op_by_op(
    x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor, w1: Weights, w2: Weights
) -> torch.Tensor:
    """moemm's parts with plain torch between permute and combine: what fusing them saves."""
    plan = ops.plan(experts_TK, num_experts=len(w1))
    rows = ops.permute(x_TD, plan.order_R, plan.inverse_TK).split(plan.counts_E.tolist())
    y_RD = torch.cat([F.linear(swiglu(F.linear(x, a)), b) for x, a, b in zip(rows, w1, w2, strict=True)])
    return ops.combine(y_RD, plan.inverse_TK, gates_TK)


def loop(
    x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor, w1: Weights, w2: Weights
) -> torch.Tensor:
    """A loop over experts with one parameter each: where, index_select, index_add."""
    out_TD = torch.zeros_like(x_TD)
    for expert, (a, b) in enumerate(zip(w1, w2, strict=True)):
        token, slot = torch.where(experts_TK == expert)
        y = F.linear(swiglu(F.linear(x_TD.index_select(0, token), a)), b)
        out_TD = out_TD.index_add(0, token, y * gates_TK[token, slot, None].to(y.dtype))
    return out_TD


def grouped_mm(
    x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor
) -> torch.Tensor:
    """torch's grouped_mm over stacked weights, with argsort and index_select; what Hugging Face's "grouped" does."""
    flat = experts_TK.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=w1.shape[0]).cumsum(0).int()
    x_RD = x_TD.index_select(0, order // experts_TK.shape[1])
    h_RF = swiglu(F.grouped_mm(x_RD, w1.transpose(1, 2), offs=ends))
    y_RD = F.grouped_mm(h_RF, w2.transpose(1, 2), offs=ends) * gates_TK.flatten()[order, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, order // experts_TK.shape[1], y_RD)
