"""Groups of ranks that share the experts of a layer, and groups of ranks that hold the same ones.

With 8 ranks and groups of 4: tokens travel inside 0 1 2 3 and 4 5 6 7; gradients of experts are added up over 0 4, 1 5,
2 6 and 3 7, those of everything else over all.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class ExpertGroups:
    """This rank's groups. size: of the first; position: this rank's place in it.

    exchange, replicas: process groups, None in a world of its own. *_ranks: their ranks.
    """

    size: int = 1
    position: int = 0
    exchange: Any = None
    exchange_ranks: tuple[int, ...] = (0,)
    replicas: Any = None
    replica_ranks: tuple[int, ...] = (0,)


_MADE: dict[int, ExpertGroups] = {}


def expert_groups(size: int, *, timeout_s: float) -> ExpertGroups:
    """The groups for expert-parallel groups of `size` ranks, which divides the world; made once, all ranks together.

    timeout_s: seconds after which a collective in them that lacks a rank fails; torch's own default is half an hour.
    """
    if size == 1:
        return ExpertGroups()
    if size not in _MADE:
        _MADE[size] = _make(size, timedelta(seconds=timeout_s))
    return _MADE[size]


def _make(size: int, timeout: timedelta) -> ExpertGroups:
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {}
    parts = {
        "replica": [range(position, world, size) for position in range(size)],
        "exchange": [range(first, first + size) for first in range(0, world, size)],
    }
    for name, groups in parts.items():
        for ranks in groups:  # every rank makes every group, in one order
            group = dist.new_group(list(ranks), timeout=timeout)
            if rank in ranks:
                found |= {name: group, f"{name}_ranks": tuple(ranks)}
    return ExpertGroups(
        size,
        rank % size,
        found["exchange"],
        found["exchange_ranks"],
        found["replica"],
        found["replica_ranks"],
    )


def forget_expert_groups() -> None:
    """Let go of all of them, when the process group that they belong to is left."""
    _MADE.clear()
