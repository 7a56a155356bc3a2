"""Harmonizers by name: functions from a Gram matrix of gradients to one weight for each loss.

X Gram matrices (samples, groups ...), T losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from moemm.config.entry import load_entry
from moemm.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class Context:
    """What a harmonizer may know besides the Gram matrix.

    gamma: cosine under which two losses are in conflict. strength: c of CAGrad, rate of GradVac.
    generator: for methods that draw; the same on all ranks, so that their draws are. state: name -> (T, T) float64 of
    what the method keeps from step to step, to be changed in place; saved with the run.
    """

    gamma: float = 0.0
    strength: float = 0.5
    generator: torch.Generator | None = None
    state: dict[str, torch.Tensor] = field(default_factory=dict)


Weigh = Callable[[torch.Tensor, Context], torch.Tensor]
"""(gram_XTT, context) -> (X, T). gram_XTT: float64, symmetric, mean of each diagonal 1, no row zero or not finite.

The weights are on the scale of the sum: those of losses that do not conflict are about 1.
"""


class Harmonizer(NamedTuple):
    """A method. keeps: names of its state. drops: the method that says what is left out before the heads, or ""."""

    weigh: Weigh
    keeps: tuple[str, ...] = ()
    drops: str = ""


HARMONIZERS: dict[str, Harmonizer] = {}


def register_harmonizer(name: str, *, keeps: tuple[str, ...] = (), drops: str = "") -> Callable[[Weigh], Weigh]:
    """Make a function known as `harmonize.method: NAME`. A name that is taken by another function is an error.

    keeps: names of (T, T) tensors, zeros at the start, that `context.state` holds for it from step to step.
    drops: the method, itself or another one, that is asked in a first pass of the losses: a sample to whose losses it
    gives a weight of 0 is left out of them, heads included (of `objectives.contrastive`, with `per: sample`). In the
    second pass `gamma` is -1: nothing is left to be dropped.
    """

    def add(weigh: Weigh) -> Weigh:
        known = HARMONIZERS.get(name)
        if known is not None and known.weigh is not weigh:
            raise ConfigError(f"harmonizer '{name}' is registered by both {known.weigh} and {weigh}")
        HARMONIZERS[name] = Harmonizer(weigh, keeps, drops)
        return weigh

    return add


def find(method: str) -> Harmonizer:
    """The harmonizer of this name, an installed package's too (entry point `moemm.harmonizers`). Raises ConfigError."""
    if method not in HARMONIZERS:
        load_entry("harmonizer", method, HARMONIZERS)  # registers it
    if method not in HARMONIZERS:
        raise ConfigError(
            f"harmonize.method: no harmonizer '{method}'\n"
            f"  allowed: {', '.join(sorted(HARMONIZERS))}\n"
            "  to do: name one of these, or register yours with @moemm.register_harmonizer"
        )
    return HARMONIZERS[method]
