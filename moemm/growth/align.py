"""Hidden units of one expert put into the order of another's, so that the two can be averaged.

D width, F hidden units, N tokens. An expert is w2 act(w1 x), with w1 (F, D), or (2F, D) for swiglu, and w2 (D, F):
exchanging hidden units, in the rows of w1 and the columns of w2 alike, changes nothing of what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from moemm.growth.soup import weighted_mean
from moemm.ops.reference import ACTIVATIONS

Pair = tuple[torch.Tensor, torch.Tensor]


def match_units(reference: Pair, other: Pair) -> torch.Tensor:
    """(F,) int64: for each hidden unit of `reference` the unit of `other` that plays its part.

    The assignment with the largest sum of products of incoming and outgoing weights (arXiv:2209.04836).
    """
    from scipy.optimize import linear_sum_assignment

    (w1_HD, w2_DF), (other1_HD, other2_DF) = (
        [w.detach().double().numpy() for w in pair] for pair in (reference, other)
    )
    hidden = w2_DF.shape[1]
    like_FF = w2_DF.T @ other2_DF
    for own, its in zip(_halves(w1_HD, hidden), _halves(other1_HD, hidden), strict=True):
        like_FF += own @ its.T
    return torch.from_numpy(linear_sum_assignment(like_FF, maximize=True)[1].astype(np.int64))


def permuted(pair: Pair, order_F: torch.Tensor) -> Pair:
    """The same expert with its hidden units in another order: unit i is what unit order_F[i] was."""
    w1_HD, w2_DF = pair
    halves = w1_HD.shape[0] // w2_DF.shape[1]
    rows_H = torch.cat([order_F + half * order_F.shape[0] for half in range(halves)])
    return w1_HD[rows_H].contiguous(), w2_DF[:, order_F].contiguous()


def run_expert(pair: Pair, x_ND: torch.Tensor, activation: str) -> torch.Tensor:
    """(N, D) -> (N, D), in the type of the weights."""
    act: Callable[[torch.Tensor], torch.Tensor] = ACTIVATIONS[activation]
    return F.linear(act(F.linear(x_ND, pair[0])), pair[1])


def merge_pairs(pairs: Sequence[Pair], shares: Sequence[float]) -> Pair:
    """Mean of experts whose hidden units are in one order."""
    w1_HD, w2_DF = (weighted_mean([pair[part] for pair in pairs], shares) for part in (0, 1))
    return w1_HD, w2_DF


def _halves(w1_HD: np.ndarray, hidden: int) -> list[np.ndarray]:
    return [w1_HD[start : start + hidden] for start in range(0, w1_HD.shape[0], hidden)]
