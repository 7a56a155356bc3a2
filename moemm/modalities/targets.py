"""What masked modelling asks of a modality: for each token, the values or the class to tell from the other tokens.

T tokens, X values of a token, V classes, G columns or channels whose tokens are not interchangeable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShape:
    """Widths of the decoder: values to regress, classes to tell apart (0: none of the kind), and groups of tokens.

    groups: tokens of different columns of a table, or channels of a sensor, are hidden by different embeddings, since
    which column it is must stay known, and are exchanged only among themselves.
    """

    values: int = 0
    classes: int = 0
    groups: int = 1


class Targets(NamedTuple):
    """One row a token, in the tokenizer's order before it leaves tokens out; made without noise and without gradient.

    values_TX (T, X) float32 of about unit variance, NaN where there is nothing to tell.
    class_T (T,) int64, -1 where there is nothing to tell. group_T (T,) int64.
    """

    values_TX: torch.Tensor
    class_T: torch.Tensor
    group_T: torch.Tensor


def value_targets(values_TX: torch.Tensor, group_T: torch.Tensor | None = None) -> Targets:
    """Targets of a modality that has values only."""
    nothing_T = torch.full((values_TX.shape[0],), -1, dtype=torch.int64, device=values_TX.device)
    return Targets(values_TX.float(), nothing_T, torch.zeros_like(nothing_T) if group_T is None else group_T)


def class_targets(class_T: torch.Tensor) -> Targets:
    """Targets of a modality that has classes only."""
    return Targets(torch.zeros(class_T.shape[0], 0, device=class_T.device), class_T, torch.zeros_like(class_T))


def standardize_tokens(values_TX: torch.Tensor) -> torch.Tensor:
    """Each row less its mean, over its deviation (MAE's targets, arXiv:2111.06377)."""
    centred_TX = values_TX - values_TX.mean(1, keepdim=True)
    return centred_TX * torch.rsqrt(centred_TX.square().mean(1, keepdim=True) + 1e-4)
