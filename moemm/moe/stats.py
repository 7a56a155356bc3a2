"""Sums over tokens that the router losses and the load plots need. L layers, M modalities, E routed experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class RouterStats:
    """Sums over the tokens of one batch on one rank; fp32.

    load_LME: how many times an expert was chosen (no gradient).
    prob_LME: router probability given to an expert.
    z_LM: squared log-sum-exp of the logits.
    tokens_M: number of tokens (no gradient).
    """

    load_LME: torch.Tensor
    prob_LME: torch.Tensor
    z_LM: torch.Tensor
    tokens_M: torch.Tensor

    @classmethod
    def stack(cls, layers: Sequence[RouterStats]) -> RouterStats:
        """The statistics of several layers as one."""
        return cls(
            torch.cat([s.load_LME for s in layers]),
            torch.cat([s.prob_LME for s in layers]),
            torch.cat([s.z_LM for s in layers]),
            layers[0].tokens_M,
        )


def sum_by_modality(values_TX: torch.Tensor, modality_T: torch.Tensor, num_modalities: int) -> torch.Tensor:
    """(M, X) sums of the rows of each modality; values_TX (T, X) floating, modality_T (T,) int64."""
    out = values_TX.new_zeros(num_modalities, values_TX.shape[1])
    return out.index_add(0, modality_T, values_TX)
