"""Weights of several runs made into those of one: arithmetic on tensors by name, in float64, rounded once."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence

import torch

Weights = Mapping[str, torch.Tensor]
FLOOR = 1e-6
"""What is added to each Fisher value, as a share of the mean of all: where no sample reached, runs count the same."""


def weighted_mean(tensors: Sequence[torch.Tensor], shares: Sequence[float | torch.Tensor]) -> torch.Tensor:
    """Mean of tensors of one shape, in the type of the first; of equal ones that tensor bit by bit.

    shares: of each, at least 0 and not all 0: numbers, or tensors of that shape. Tensors that are not floating are
    states and no weights: the first is taken.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    # Not from 0: -0.0 would become 0.0.
    parts = [tensor.double() * share for tensor, share in zip(tensors, shares, strict=True)]
    return (functools.reduce(operator.add, parts) / functools.reduce(operator.add, shares)).to(first.dtype)


def uniform_soup(runs: Sequence[Weights]) -> dict[str, torch.Tensor]:
    """The plain mean of runs with the same tensors (arXiv:2203.05482)."""
    return {name: weighted_mean([run[name] for run in runs], [1.0] * len(runs)) for name in runs[0]}


def fisher_soup(runs: Sequence[Weights], fishers: Sequence[Weights]) -> dict[str, torch.Tensor]:
    """The mean in which each parameter counts by its Fisher value (arXiv:2111.09832, all runs alike).

    fishers: of each run, at least 0, float64; a tensor without one (a buffer, say) is averaged plainly.
    """
    total = sum(float(fisher.sum()) for each in fishers for fisher in each.values())
    number = sum(fisher.numel() for each in fishers for fisher in each.values())
    floor = FLOOR * total / number if total > 0 else 1.0
    return {
        name: weighted_mean([run[name] for run in runs], [each[name] + floor for each in fishers])
        if name in fishers[0]
        else weighted_mean([run[name] for run in runs], [1.0] * len(runs))
        for name in runs[0]
    }


def task_vector(base: Weights, tuned: Sequence[Weights], alpha: float) -> dict[str, torch.Tensor]:
    """base + alpha x the sum of (run - base) over the tuned runs (arXiv:2212.04089).

    With one tuned run this is the line from base to run of WiSE-FT (arXiv:2109.01903): base bit by bit at 0, the run at
    1. Tensors that are not floating are the base's.
    """
    own = 1.0 - alpha * len(tuned)
    made = {}
    for name, value in base.items():
        if value.is_floating_point() and alpha:
            moved = functools.reduce(operator.add, (run[name].double() for run in tuned))
            made[name] = (value.double() * own + moved * alpha).to(value.dtype)
        else:
            made[name] = value.clone()
    return made


def changed_bits(before: Weights, after: Weights) -> int:
    """Number of tensors of `before` that are not the same in `after`, bit by bit."""
    return sum(not _same_bits(value, after[name]) for name, value in before.items())


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)
