"""Rows that change ranks: all-to-all with a gradient, under way while something else is computed.

A trip is two nodes of the autograd graph: `depart` begins it and `arrive` waits for it; what is computed in between
runs meanwhile. On the way back `arrive` sends the gradients off and `depart` waits for them, so that the backward pass
of what lay in between runs meanwhile, too. N rows that leave, R rows that come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

Group = Any
"""A torch.distributed process group."""


def exchange_counts(counts_G: torch.Tensor, group: Group) -> tuple[list[int], list[int]]:
    """Rows to each of the G ranks, (G,) int64 -> rows that go to each, rows that come from each. Waits for the device.
    """  # fmt: skip
    come_G = torch.empty_like(counts_G)
    dist.all_to_all_single(come_G, counts_G, group=group)
    leave, come = torch.stack([counts_G, come_G]).tolist()
    return leave, come


class Trip:
    """Rows on the way to the ranks of a group, and the gradients on the way back."""

    def __init__(self, leave: Sequence[int], come: Sequence[int], group: Group) -> None:
        self._leave, self._come, self._group = list(leave), list(come), group
        self._under_way: Any = None
        self._sent: torch.Tensor | None = None
        self._gradients: torch.Tensor | None = None

    def depart(self, x_NF: torch.Tensor) -> torch.Tensor:
        """Begin; (N, F) -> (R, F) that holds nothing before `arrive`."""
        out: torch.Tensor = _Depart.apply(x_NF, self)
        return out

    def arrive(self, x_RF: torch.Tensor) -> torch.Tensor:
        """Wait for what `depart` returned."""
        out: torch.Tensor = _Arrive.apply(x_RF, self)
        return out

    def start(self, rows: torch.Tensor, *, back: bool) -> torch.Tensor:
        """Send rows off, from R to N where they go back; the buffer for those that come."""
        leave, come = (self._come, self._leave) if back else (self._leave, self._come)
        self._sent = rows.contiguous()  # kept until it has gone
        out = rows.new_empty(sum(come), *rows.shape[1:])
        self._under_way = dist.all_to_all_single(
            out, self._sent, output_split_sizes=come, input_split_sizes=leave, group=self._group, async_op=True
        )
        return out

    def wait(self) -> None:
        """Until the rows that were sent off last are there."""
        self._under_way.wait()
        self._under_way = self._sent = None

    def send_back(self, grad_RF: torch.Tensor) -> None:
        """Send the gradients of the rows that came off to where these are from."""
        self._gradients = self.start(grad_RF, back=True)

    def returned(self) -> torch.Tensor:
        """The gradients of the rows that left."""
        self.wait()
        gradients, self._gradients = self._gradients, None
        assert gradients is not None
        return gradients


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NF: torch.Tensor, trip: Trip) -> torch.Tensor:
        ctx.trip = trip
        return trip.start(x_NF, back=False)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.trip.returned(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RF: torch.Tensor, trip: Trip) -> torch.Tensor:
        ctx.trip = trip
        trip.wait()
        return x_RF.view_as(x_RF)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # The gradients of the rows that left have another shape: they travel in the trip, and `depart` gives them on.
        ctx.trip.send_back(gradients[0])
        return gradients[0], None
