"""Which pairs of modalities look wrong: a running loss for every training sample and pair, and whether they fall into
two groups.

Wrong pairs are learned late (arXiv:1706.05394), so that for a while their losses lie above those of right ones; a
mixture of two normal distributions tells them apart (noisy correspondence, Huang et al., NeurIPS 2021; DivideMix,
arXiv:2002.07394). Where the two lie too close there is nothing to be told, and every pair counts.

R training samples, P pairs of modalities, N samples of a micro-batch on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moemm.exact import ExactBuffers

RATE = 0.5
"""Of the running loss."""
APART = 2.0
"""Ashman's D from which two normal distributions are clearly apart (Ashman, Bird and Zepf 1994)."""
LEAST = 256
"""Samples below which no mixture is fitted."""
ROUNDS = 50
"""Of expectation and maximisation."""


class Suspects(NamedTuple):
    """Of one pair of modalities, the samples that look wrong, worst first.

    apart: Ashman's D of the two groups; share: of the samples seen, those more likely wrong than right; 0 where the
    groups are not apart. task: its number; place: in its file; loss: running, less the mean; wrong: probability.
    """

    apart: float
    share: float
    seen: int
    task: list[int]
    place: list[int]
    loss: list[float]
    wrong: list[float]


class PairNoise(ExactBuffers):
    """Running losses of pairs, less the mean of their micro-batch, and how likely each is right.

    sizes: task -> number of rows of its file, 0 for a task without pairs. All ranks must be told the same.
    start: share of the training from which `weights` follow the estimates; 1: never.
    """

    first_K: torch.Tensor
    loss_RP: torch.Tensor
    seen_RP: torch.Tensor
    right_RP: torch.Tensor
    apart_P: torch.Tensor

    def __init__(self, sizes: Sequence[int], num_pairs: int, *, start: float):
        super().__init__()
        self.start, self.progress = start, 0.0  # share of the training that is done, to be set before each step
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None
        first_K = torch.tensor([0, *sizes]).cumsum(0)
        self.register_buffer("first_K", first_K, persistent=False)
        self.register_buffer("loss_RP", torch.zeros(int(first_K[-1]), num_pairs))
        self.register_buffer("seen_RP", torch.zeros(int(first_K[-1]), num_pairs, dtype=torch.bool))
        self.register_buffer("right_RP", torch.ones(int(first_K[-1]), num_pairs))
        self.register_buffer("apart_P", torch.zeros(num_pairs))

    def rows(self, task_N: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
        """(N,) int64 the row of each sample; any row for one of a task without pairs."""
        return (self.first_K[task_N] + index_N).clamp_max(self.loss_RP.shape[0] - 1)

    def weights(self, row_N: torch.Tensor) -> torch.Tensor:
        """(N, P) what the losses of the samples' pairs count."""
        if self.progress < self.start:
            return self.right_RP.new_ones(row_N.shape[0], self.right_RP.shape[1])
        return self.right_RP[row_N]

    def see(self, row_N: torch.Tensor, loss_NP: torch.Tensor) -> None:
        """The losses of a micro-batch of all ranks, NaN where a sample lacks the pair; they count at `keep`."""
        has_N = ~loss_NP.isnan().all(1)
        self._last = row_N[has_N], loss_NP[has_N].detach().float()

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The micro-batch that was seen last, for `keep`; None where it was taken already."""
        last, self._last = self._last, None
        return last

    def keep(self, last: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        """Count a micro-batch that `take` gave, or the one that was seen last, if any."""
        last = last or self.take()
        if last is None:
            return
        row_N, loss_NP = last
        known_NP = torch.isfinite(loss_NP)
        # Against the others of the batch: losses fall while training, and samples come at different times.
        loss_NP = loss_NP - loss_NP.where(known_NP, 0.0).sum(0) / known_NP.sum(0).clamp_min(1)
        before_NP, seen_NP = self.loss_RP[row_N], self.seen_RP[row_N]
        mixed_NP = torch.where(seen_NP, before_NP + RATE * (loss_NP - before_NP), loss_NP)
        self.loss_RP[row_N] = torch.where(known_NP, mixed_NP, before_NP)
        self.seen_RP[row_N] = seen_NP | known_NP

    def advance(self, step: int, total: int) -> None:
        """After a step (1-based) of `total`: fit the mixtures anew, a hundred times in a training."""
        if 100 * step // total == 100 * (step - 1) // total:
            return
        for pair in range(self.loss_RP.shape[1]):
            known_R = self.seen_RP[:, pair]
            self.right_RP[:, pair], self.apart_P[pair] = 1.0, 0.0
            if int(known_R.sum()) >= LEAST:
                right_R, apart = two_groups(self.loss_RP[known_R, pair])
                self.apart_P[pair] = apart
                if float(apart) > APART:
                    self.right_RP[known_R, pair] = right_R

    def shares(self) -> list[float]:
        """Of each pair, the share of the samples seen that are more likely wrong than right."""
        wrong_P = ((self.right_RP < 0.5) & self.seen_RP).sum(0) / self.seen_RP.sum(0).clamp_min(1)
        shares: list[float] = wrong_P.tolist()
        return shares

    def suspects(self, pair: int, *, most: int) -> Suspects:
        """The samples with the highest running losses of a pair."""
        seen_r = self.seen_RP[:, pair].nonzero().flatten()
        order = torch.argsort(self.loss_RP[seen_r, pair], descending=True, stable=True)[:most]
        row_r = seen_r[order]
        task_r = torch.searchsorted(self.first_K, row_r, right=True) - 1
        return Suspects(
            apart=float(self.apart_P[pair]),
            share=self.shares()[pair],
            seen=len(seen_r),
            task=task_r.tolist(),
            place=(row_r - self.first_K[task_r]).tolist(),
            loss=self.loss_RP[row_r, pair].tolist(),
            wrong=(1.0 - self.right_RP[row_r, pair]).tolist(),
        )


def two_groups(value_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R,) float32 the probability that each value is of the lower of two normal distributions, and Ashman's D of them.

    Fitted by expectation and maximisation in float64 from the quantiles .2 and .8. The probability falls with the
    value: under the lower mean it is 1, over the upper one 0. D is 0 where one distribution explains the values as well
    (Schwarz's criterion, BIC), as it does where they are few.
    """
    x_R = value_R.double()
    x_R = (x_R - x_R.mean()) / x_R.std().clamp_min(1e-12)
    powers_3R = torch.stack([torch.ones_like(x_R), x_R, x_R.square()])
    total_3, ordered_R = powers_3R.sum(1), x_R.sort().values
    mean_2 = torch.stack([ordered_R[int(0.2 * len(x_R))], ordered_R[int(0.8 * len(x_R))]])
    variance_2, part_2 = torch.full_like(mean_2, 0.25), torch.full_like(mean_2, 0.5)
    low_R = torch.zeros_like(x_R)
    for _ in range(ROUNDS):
        # log of the odds that a value is of the first group: a polynomial in the value
        odds_2 = torch.stack([part_2.log() - 0.5 * variance_2.log() - mean_2.square() / (2.0 * variance_2),
                              mean_2 / variance_2, -0.5 / variance_2])  # fmt: skip
        low_R = torch.sigmoid((odds_2[:, 0] - odds_2[:, 1]) @ powers_3R)
        first_3 = powers_3R @ low_R
        moments_32 = torch.stack([first_3, total_3 - first_3], dim=1)
        count_2 = moments_32[0] + 1e-9
        mean_2 = moments_32[1] / count_2
        variance_2 = (moments_32[2] / count_2 - mean_2.square()).clamp_min(0.0) + 1e-4
        part_2 = count_2 / count_2.sum()
    log_2R = part_2.log()[:, None] - 0.5 * (
        variance_2.log()[:, None] + (x_R - mean_2[:, None]) ** 2 / variance_2[:, None]
    )
    gain = (log_2R.logsumexp(0) + 0.5 * x_R.square()).sum()  # of the log-likelihood, over one of variance 1
    better = 2.0 * gain > 3.0 * math.log(len(x_R))
    if bool(mean_2[0] > mean_2[1]):
        low_R, mean_2 = 1.0 - low_R, mean_2.flip(0)
    low_R = torch.where(x_R <= mean_2[0], 1.0, torch.where(x_R >= mean_2[1], 0.0, low_R))
    apart = 2.0**0.5 * (mean_2[1] - mean_2[0]).abs() / variance_2.sum().sqrt()
    return low_R.float(), torch.where(better, apart, 0.0).float()
