"""The few collectives that moemm itself needs. With one process each returns its argument and sends nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from moemm.errors import MoemmError

T = TypeVar("T")
_last, _count = "", 0


def note_collective(name: str) -> None:
    """Remember that a collective begins here."""
    global _last, _count
    _last, _count = name, _count + 1


def last_collective() -> str:
    """The last collective that this process began, and the how many-eth it was; empty where there was none."""
    return f"{_last} (number {_count})" if _count else ""


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def num_ranks() -> int:
    """Processes of this job."""
    return 1 if _alone() else dist.get_world_size()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` over all ranks, added up in float64 and returned in the tensor's own type.

    Without a gradient: the result is detached. Every rank must call it with the same shape.
    """
    detached = tensor.detach()
    if _alone():
        return detached
    note_collective("sum_over_ranks")
    total = detached.to(torch.float64, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.dtype)


def max_over_ranks(values: list[int]) -> list[int]:
    """Largest of each of the integers (int64) over all ranks, in one message."""
    if _alone():
        return list(values)
    note_collective("max_over_ranks")
    largest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(value) for value in largest.tolist()]


def agree(flag: bool) -> bool:
    """True on every rank as soon as it is True on one."""
    return bool(max_over_ranks([int(flag)])[0])


def gather_rows(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The rows of all ranks under each other, by rank, and the number of rows before this rank's.

    Without a gradient. Ranks may have different numbers of rows, also none, but must agree in type and further axes.
    """
    own = rows.detach().contiguous()
    if _alone():
        return own, 0
    note_collective("gather_rows")
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([own.shape[0]]))
    sizes = [int(count) for count in counts]
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: own.shape[0]] = own
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded)
    return torch.cat([one[:size] for one, size in zip(everyone, sizes, strict=True)]), sum(sizes[: dist.get_rank()])


def broadcast_object(value: T) -> T:
    """Rank 0's `value` on every rank. It travels as a pickle between the processes of one job only."""
    if _alone():
        return value
    note_collective("broadcast_object")
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The `value` of every rank, by rank, on every rank."""
    if _alone():
        return [value]
    note_collective("gather_objects")
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; its result, or its MoemmError, on every rank."""
    if _alone():
        return action()
    outcome: tuple[T | None, MoemmError | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except MoemmError as error:
            outcome = (None, error)
    result, problem = broadcast_object(outcome)
    if problem is not None:
        raise problem
    return cast(T, result)
