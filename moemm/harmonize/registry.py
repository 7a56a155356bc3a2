"""Harmonizers by name: functions from a Gram matrix of gradients to one weight for each loss.

X Gram matrices (samples, groups ...), T losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moemm.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class Context:
    """What a harmonizer may know besides the Gram matrix.

    gamma: cosine under which two losses are in conflict. strength: c of CAGrad, rate of GradVac.
    generator: for methods that draw; the same on all ranks, so that their draws are. state: what a method keeps from
    step to step, by name; tensors with a leading axis per loss or pair of losses.
    """

    gamma: float = 0.0
    strength: float = 0.5
    generator: torch.Generator | None = None
    state: dict[str, torch.Tensor] = field(default_factory=dict)


Weigh = Callable[[torch.Tensor, Context], torch.Tensor]
"""(gram_XTT, context) -> (X, T). gram_XTT: float64, symmetric, mean of each diagonal 1, no row zero or not finite.

The weights are on the scale of the sum: those of losses that do not conflict are about 1.
"""

HARMONIZERS: dict[str, Weigh] = {}


def register_harmonizer(name: str) -> Callable[[Weigh], Weigh]:
    """Make a function known as `harmonize.method: NAME`. A name that is taken by another function is an error."""

    def add(weigh: Weigh) -> Weigh:
        known = HARMONIZERS.get(name)
        if known is not None and known is not weigh:
            raise ConfigError(f"harmonizer '{name}' is registered by both {known} and {weigh}")
        HARMONIZERS[name] = weigh
        return weigh

    return add
