"""From expert ids to rows grouped by expert, and back: the plan that permute and combine follow.

T tokens, K slots a token, R = T K rows, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moemm import ops


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each slot of each token goes.

    counts: rows of each expert, on the host (the row counts of the matrix products).
    order_R: slot (token K + k) that each row takes its input from; rows grouped by expert, stable.
    inverse_TK: row of each slot.
    """

    counts: list[int]
    order_R: torch.Tensor
    inverse_TK: torch.Tensor

    @classmethod
    def from_experts(cls, experts_TK: torch.Tensor, *, num_experts: int) -> Plan:
        """A stable counting sort of the slots by expert id; experts_TK (T, K) int64 in [0, num_experts)."""
        flat_R = experts_TK.reshape(-1)
        order_R = torch.argsort(flat_R, stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        counts = torch.bincount(flat_R, minlength=num_experts).tolist()
        return cls(counts, order_R, inverse_R.view_as(experts_TK))

    def permute(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (R, D), the rows of each expert together."""
        return ops.permute(x_TD, self.order_R, self.inverse_TK)

    def combine(self, y_RD: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        """(R, D) -> (T, D), the sum of a token's rows weighted by its gates."""
        return ops.combine(y_RD, self.inverse_TK, gates_TK)
