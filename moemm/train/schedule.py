"""Learning rate and weights of objectives as pure functions of the step: resuming needs no scheduler state."""

from __future__ import annotations

import math

from moemm.config.schema import ObjectiveConfig


def learning_rate(step: int, *, total: int, peak: float, warmup: float, floor: float) -> float:
    """Linear warm-up to `peak`, then a cosine down to `floor * peak` (Loshchilov and Hutter, arXiv:1608.03983).

    step: 0-based optimizer step of `total`; warmup: share of `total` that rises; floor: last rate as a share of `peak`.
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1, total - 1 - rising))
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def objective_weight(step: int, *, total: int, config: ObjectiveConfig) -> float:
    """Factor on an objective at a 0-based step of `total`: linear from `start` to `weight`, then constant."""
    if config.start is None:
        return config.weight
    progress = min(1.0, step / max(1.0, config.over * (total - 1)))
    return config.start + (config.weight - config.start) * progress
