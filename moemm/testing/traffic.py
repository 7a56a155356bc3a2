"""Count what collectives send: every call of a process group of this process, by kind, in bytes.

with count_traffic() as traffic:
    train_some_steps()
traffic.bytes["all_reduce"], traffic.calls["all_reduce"]

Counted is the payload, whatever the algorithm behind makes of it: of all_reduce, broadcast and reduce the tensor; of
all_gather and reduce_scatter the whole tensor (all ranks' parts); of all_to_all what this rank hands in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.distributed import ProcessGroup

from moemm.moe import dispatcher
from moemm.moe.exchange import exchange_counts

_KINDS: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), ("all_reduce", 0)),
    **dict.fromkeys(("reduce", "broadcast"), ("", 0)),
    **dict.fromkeys(
        (
            "allgather", "_allgather_base", "all_gather_single", "allgather_coalesced",
            "allgather_into_tensor_coalesced", "all_gather_single_coalesced",
        ),
        ("all_gather", 0),
    ),
    **dict.fromkeys(
        (
            "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced",
            "reduce_scatter_single_coalesced",
        ),
        ("reduce_scatter", 1),
    ),
    **dict.fromkeys(("alltoall", "alltoall_base", "all_to_all_single"), ("all_to_all", 1)),
}  # fmt: skip
"""Method of ProcessGroup, by its names in several releases of torch -> kind (its own name where that is empty), and
which of its arguments holds the payload (0: the output)."""


@dataclass
class Traffic:
    """kind -> bytes and calls. sizes: (kind, bytes of one call) -> how many of them there were."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, kind: str, amount: int) -> None:
        """Count one call."""
        self.bytes[kind] += amount
        self.calls[kind] += 1
        self.sizes[kind, amount] += 1


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the collectives of all process groups until the end of the block. Groups of one rank count nothing."""
    traffic = Traffic()
    # From the class itself: what getattr gives would, set again, get no group any more.
    kept = {name: vars(ProcessGroup)[name] for name in _KINDS if name in vars(ProcessGroup)}
    for name, method in kept.items():
        setattr(ProcessGroup, name, _counted(method, _KINDS[name][0] or name, _KINDS[name][1], traffic))
    try:
        yield traffic
    finally:
        for name, method in kept.items():
            setattr(ProcessGroup, name, method)


def _counted(method: Callable[..., Any], kind: str, place: int, traffic: Traffic) -> Callable[..., Any]:
    def call(group: ProcessGroup, *given: Any, **named: Any) -> Any:
        if group.size() > 1:
            payload = given[place] if len(given) > place else list(named.values())[place]
            traffic.add(kind, _nbytes(payload))
        return method(group, *given, **named)

    return call


def _nbytes(payload: Any) -> int:
    """Bytes of a tensor, or of all tensors in lists of them."""
    if isinstance(payload, torch.Tensor):
        return payload.nbytes
    return sum(map(_nbytes, payload))


@contextmanager
def count_rows() -> Iterator[list[int]]:
    """Tokens that leave for the ranks of a group, this one included, in each exchange of experts, in order."""
    found: list[int] = []

    def counted(counts_G: torch.Tensor, group: Any) -> tuple[list[int], list[int]]:
        leave, come = exchange_counts(counts_G, group)
        found.append(sum(leave))
        return leave, come

    with mock.patch.object(dispatcher, "exchange_counts", counted):
        yield found
