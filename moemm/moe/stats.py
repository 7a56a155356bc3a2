"""Sums over tokens that the router losses and the load plots need. L layers with a router, M rows, E routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch


@dataclass(slots=True)
class RouterStats:
    """Sums over the tokens of one batch on one rank; fp32. A row is a modality, see ExpertMap.

    E counts the routed experts of all layers; columns of experts that a layer does not have are 0.

    load_LME: how many times an expert was chosen (no gradient).
    prob_LME: router probability given to an expert.
    smooth_LME: differentiable load, of noisy routers, else 0.
    z_LM: squared log-sum-exp of the logits.
    entropy_LM: entropy of each token's probabilities, where a loss wants it, else 0.
    binding_LM: cross entropy to the expert of the sample's modalities, of combination routers, else 0.
    dropped_LM: slots that found no room, of routers with a capacity, else 0 (no gradient).
    tokens_M: number of tokens (no gradient).
    slots: of one layer alone, and no sum: gates (T, K) and routed experts (T, K) int64 of its tokens, -1 for a slot
        without expert (no gradient).
    """

    load_LME: torch.Tensor
    prob_LME: torch.Tensor
    smooth_LME: torch.Tensor
    z_LM: torch.Tensor
    entropy_LM: torch.Tensor
    binding_LM: torch.Tensor
    dropped_LM: torch.Tensor
    tokens_M: torch.Tensor
    slots: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def stack(cls, layers: Sequence[RouterStats]) -> RouterStats:
        """The statistics of several layers as one."""
        names = [field.name for field in fields(cls) if field.name not in ("tokens_M", "slots")]
        joined: dict[str, Any] = {name: torch.cat([getattr(stats, name) for stats in layers]) for name in names}
        return cls(**joined, tokens_M=layers[0].tokens_M)

    @property
    def parts(self) -> list[torch.Tensor]:
        """All sums, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self) if field.name != "slots"]


def sum_by_row(values_TX: torch.Tensor, row_T: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(M, X) sums over the tokens of each row; values_TX (T, X) floating, row_T (T,) int64."""
    out = values_TX.new_zeros(num_rows, values_TX.shape[1])
    return out.index_add(0, row_T, values_TX)
