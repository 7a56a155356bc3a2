"""plan: where each slot of each token goes, so that the rows of each expert lie together.

T tokens, K slots a token, E experts, R = T K rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moemm.ops import check, reference
from moemm.ops.backend import COMPILED


class Plan(NamedTuple):
    """What permute, grouped_mlp and combine follow.

    counts_E: (E,) int64 rows of each expert.
    offsets_E1: (E + 1,) int64 first row of each expert; the last entry ends the last one.
    order_R: (R,) slot (token K + k) that each row takes its input from; rows grouped by expert, within an expert in the
        order of the slots. Rows after the last expert's, as many as slots were dropped, hold -1.
    inverse_TK: (T, K) row of each slot, -1 where it was dropped.
    """

    counts_E: torch.Tensor
    offsets_E1: torch.Tensor
    order_R: torch.Tensor
    inverse_TK: torch.Tensor


def plan(experts_TK: torch.Tensor, *, num_experts: int) -> Plan:
    """A stable counting sort of the slots by expert id; nothing leaves the device.

    experts_TK: (T, K) int32 or int64, ids below num_experts; -1: the slot is dropped. order and inverse have its type.

    Raises KernelError for a wrong shape, type or size, IndexError for an id out of range (CPU; on CUDA the kernel
    traps; there num_experts is at most 1,024).
    """
    check.experts("plan", experts_TK, num_experts)
    if COMPILED:
        return Plan(*torch.ops.moemm.plan(experts_TK, num_experts=num_experts))
    return Plan(*reference.plan(experts_TK, num_experts=num_experts))


def _fake(experts_TK: torch.Tensor, *, num_experts: int) -> tuple[torch.Tensor, ...]:
    wide = torch.int64
    counts_E = experts_TK.new_empty(num_experts, dtype=wide)
    offsets_E1 = experts_TK.new_empty(num_experts + 1, dtype=wide)
    return counts_E, offsets_E1, experts_TK.new_empty(experts_TK.numel()), experts_TK.new_empty(experts_TK.shape)


if COMPILED:
    torch.library.register_fake("moemm::plan", _fake)
