"""From a layer's tokens and slots to the gated sum of its experts: all of them here, or spread over ranks.

T tokens, D width, K slots a token, E experts that are dispatched to, G ranks of an expert-parallel group; N rows that
leave this rank, R rows that come to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from moemm import ops
from moemm.moe.backends import RunExperts, Weights
from moemm.moe.exchange import Group, Trip, exchange_counts
from moemm.ops.grouped_mlp import Activation

Beside = Callable[[], torch.Tensor | None]


class Dispatcher(Protocol):
    """Runs the dispatched experts of a layer."""

    def __call__(
        self,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        weights: tuple[Weights, Weights],
        *,
        beside: Beside,
        activation: Activation,
    ) -> torch.Tensor:
        """beside() + gated sum of the experts' outputs, (T, D) -> (T, D).

        experts_TK: int64, numbers below E in the order of the layer's experts; -1: no expert.
        weights: w1 and w2 of the experts that this rank holds. beside: computes what is added, (T, D), or nothing.
        """


class LocalDispatcher:
    """Every expert is here."""

    def __init__(self, run_experts: RunExperts) -> None:
        self._run = run_experts

    def __call__(
        self,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        weights: tuple[Weights, Weights],
        *,
        beside: Beside,
        activation: Activation,
    ) -> torch.Tensor:
        """See Dispatcher."""
        return self._run(x_TD, gates_TK, experts_TK, *weights, residual_TD=beside(), activation=activation)


class SpreadDispatcher(nn.Module):
    """Each expert is on one rank of the group: tokens travel there, and what the experts make of them back.

    A token goes to a rank once, however many experts it has there: with its gates, so that the rank returns the gated
    sum. On the way there `beside` runs. Every rank takes part in every collective, whatever it has to send.

    ids: of the experts, in order. positions: of each. position: this rank's place in the group.
    """

    owner_E: torch.Tensor
    local_E: torch.Tensor

    def __init__(
        self, run_experts: RunExperts, ids: list[str], positions: Mapping[str, int], *, group: Group, position: int
    ) -> None:
        super().__init__()
        self._run, self._group = run_experts, group
        self.num_ranks = torch.distributed.get_world_size(group)
        mine = [name for name in ids if positions[name] == position]
        local = [mine.index(name) if name in mine else -1 for name in ids]
        # One entry more, -1, for what a slot without expert (-1) looks up.
        self.register_buffer("owner_E", torch.tensor([*(positions[name] for name in ids), -1]), persistent=False)
        self.register_buffer("local_E", torch.tensor([*local, -1]), persistent=False)

    def forward(
        self,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        weights: tuple[Weights, Weights],
        *,
        beside: Beside,
        activation: Activation,
    ) -> torch.Tensor:
        """See Dispatcher."""
        num_slots = experts_TK.shape[1]
        plan = ops.plan(_once(self.owner_E[experts_TK]), num_experts=self.num_ranks)
        leave, come = exchange_counts(plan.counts_E, self._group)
        order_N = plan.order_R[: sum(leave)]
        # Numbers of experts are exact in fp32, so that gates and experts travel as one.
        slots_T2K = torch.cat([gates_TK, experts_TK.to(gates_TK.dtype)], dim=1)
        tokens, slots = (Trip(leave, come, self._group) for _ in range(2))
        x_RD = tokens.depart(ops.permute(x_TD, order_N, plan.inverse_TK))
        slots_R2K = slots.depart(ops.permute(slots_T2K, order_N, plan.inverse_TK))
        added_TD = beside()
        x_RD, slots_R2K = tokens.arrive(x_RD), slots.arrive(slots_R2K)
        experts_RK = self.local_E[slots_R2K[:, num_slots:].long()]
        y_RD = self._run(x_RD, slots_R2K[:, :num_slots].contiguous(), experts_RK, *weights, activation=activation)
        back = Trip(come, leave, self._group)
        y_ND = back.arrive(back.depart(y_RD))
        return ops.combine(y_ND, plan.inverse_TK, torch.ones_like(gates_TK), added_TD)


def _once(owner_TK: torch.Tensor) -> torch.Tensor:
    """The same, with -1 for a slot whose rank an earlier slot of the token names."""
    repeats_TKK = (owner_TK[:, :, None] == owner_TK[:, None, :]).tril(-1)
    return owner_TK.masked_fill(repeats_TKK.any(2), -1)
