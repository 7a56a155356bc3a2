"""What the optimizer knew of a model, for the model that was made of it: AdamW's moments by the rules of its weights.

A moment belongs to a gradient, and an expert's gradient is not that of the network that it is a copy of: it sees a
share of the tokens, through a gate. So each tensor's moments are scaled by what its gradient is of the one that the
rules make of the source's gradients, both on the probe batch. What is new begins with a first moment of 0 and a second
one that is its mean squared gradient there: AdamW's count of steps is one for all, so that zeros would make the first
steps several times too long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moemm.checkpoint.state import Moments
from moemm.data.sample import PackedBatch
from moemm.growth.probe import task_loss
from moemm.growth.rules import Rule, Tensors, apply_rules, some
from moemm.models import Model


@dataclass(frozen=True, slots=True)
class Carried:
    """Moments of the new model, and how they came about, for the user."""

    moments: Moments
    told: str


def carry(old: Moments, rules: Sequence[Rule], before: Model, after: Model, batches: Sequence[PackedBatch]) -> Carried:
    """The moments of `after`, whose weights these rules make of those of `before`.

    rules: without what makes copies differ on purpose. Raises CheckpointError where they do not fit.
    """
    source, target = before.state_dict(), after.state_dict()
    first, square = (old.values[key] for key in ("exp_avg", "exp_avg_sq"))
    gradients = gradients_of(after, batches)
    wanted = _made(rules, source, target, gradients_of(before, batches))
    known = _made(rules, source, target, {name: torch.ones_like(value) for name, value in first.items()})
    first = _made(rules, source, target, first)
    # The rules choose, join and scale: so it is the root that they may be applied to.
    root = _made(rules, source, target, {name: value.sqrt() for name, value in square.items()})
    own = [name for name, parameter in after.named_parameters() if parameter.numel()]
    values: dict[str, dict[str, torch.Tensor]] = {"exp_avg": {}, "exp_avg_sq": {}}
    for name in own:
        scale = _ratio(gradients.get(name), wanted[name])
        values["exp_avg"][name] = scale * first[name]
        values["exp_avg_sq"][name] = (scale * root[name]).square()
    typical = _typical(values["exp_avg_sq"])
    for name in own:
        new = known[name] == 0
        seen = gradients[name].square().mean() if name in gradients else torch.zeros(())
        values["exp_avg_sq"][name][new] = seen if seen > 0 else typical
    begun = [name for name in own if not known[name].any()]
    parts = f"; {len(begun)} begin with their gradients on the probe batch: {some(begun)}" if begun else ""
    told = f"kept: moments of {len(own) - len(begun)} of {len(own)} tensors are those of what they were made of{parts}"
    return Carried(Moments(old.steps, values), told)


def gradients_of(model: Model, batches: Sequence[PackedBatch]) -> dict[str, torch.Tensor]:
    """Of the tasks' loss on the batches, of the parameters that have one."""
    model.zero_grad(set_to_none=True)
    task_loss(model, batches).backward()
    found = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _made(rules: Sequence[Rule], source: Tensors, target: Tensors, values: Tensors) -> dict[str, torch.Tensor]:
    """What the rules make of `values`, with zeros for all that has none and all that they draw."""
    whole = {name: values.get(name, torch.zeros_like(weight)) for name, weight in source.items()}
    return apply_rules(rules, whole, {name: torch.zeros_like(weight) for name, weight in target.items()})[0]


def _ratio(gradient: torch.Tensor | None, wanted: torch.Tensor) -> float:
    """Norm of a gradient over that of the one it was made of; 1 where one of them is 0: nothing was seen."""
    ours, theirs = float(0.0 if gradient is None else gradient.norm()), float(wanted.norm())
    return ours / theirs if ours and theirs else 1.0


def _typical(values: Mapping[str, torch.Tensor]) -> float:
    """Median over tensors of their mean, of those that are not 0."""
    means = sorted(mean for value in values.values() if (mean := float(value.mean())))
    return means[len(means) // 2] if means else 0.0
