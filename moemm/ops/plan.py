"""plan: where each slot of each token goes, so that the rows of each expert lie together.

T tokens, K slots a token, E experts, R = T K + (alignment - 1) min(E, T K) rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moemm.ops import check, reference
from moemm.ops.backend import COMPILED


class Plan(NamedTuple):
    """What permute, grouped_mlp and combine follow.

    counts_E: (E,) int64 rows of each expert.
    offsets_E1: (E + 1,) int64 first row of each expert, a multiple of the alignment; the last entry ends the last one.
    order_R: (R,) slot (token K + k) that each row takes its input from; rows grouped by expert, within an expert in the
        order of the slots. Rows that fill an expert's group up, and those after the last group, hold -1.
    inverse_TK: (T, K) row of each slot, -1 where it was dropped.
    """

    counts_E: torch.Tensor
    offsets_E1: torch.Tensor
    order_R: torch.Tensor
    inverse_TK: torch.Tensor


def plan(experts_TK: torch.Tensor, *, num_experts: int, alignment: int = 1) -> Plan:
    """A stable counting sort of the slots by expert id; nothing leaves the device.

    experts_TK: (T, K) int32 or int64, ids below num_experts; -1: the slot is dropped. order and inverse have its type.
    alignment: each expert's group of rows is filled up to a multiple of it, at least 1, with rows of no slot: permute
        makes them zeros, combine reads none of them. R is the most that any ids can need, so that it is known without
        waiting for the device. An expert without slots has no rows.

    Raises KernelError for a wrong shape, type or size, IndexError for an id out of range (CPU; on CUDA the kernel
    traps; there num_experts is at most 1,024).
    """
    check.experts("plan", experts_TK, num_experts, alignment)
    function = torch.ops.moemm.plan if COMPILED else reference.plan
    return Plan(*function(experts_TK, num_experts=num_experts, alignment=alignment))


def _fake(experts_TK: torch.Tensor, *, num_experts: int, alignment: int = 1) -> tuple[torch.Tensor, ...]:
    wide = torch.int64
    counts_E = experts_TK.new_empty(num_experts, dtype=wide)
    offsets_E1 = experts_TK.new_empty(num_experts + 1, dtype=wide)
    order_R = experts_TK.new_empty(check.plan_rows(experts_TK.numel(), num_experts, alignment))
    return counts_E, offsets_E1, order_R, experts_TK.new_empty(experts_TK.shape)


if COMPILED:
    torch.library.register_fake("moemm::plan", _fake)
