"""What one sample brings to the model on average: tokens of each row of the expert map, pairs for attention.

Averages over the mixture of tasks (`data.temperature`), with `data.modality_dropout`, tokens left out, latents,
stand-ins for absent modalities, and the views of objectives without labels. Attention stays inside a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moemm.config.check_objectives import is_on, label_free
from moemm.plan import kinds
from moemm.plan.parameters import ModelShape
from moemm.plan.shape import TaskShape

Row = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Workload:
    """Of one sample, on average. tokens: row -> tokens in the trunk, of all views. pairs: of tokens that see another.

    raw: modality -> tokens of its tokenizer. spread: deviation of a sample's tokens. pools: passes of the pooling.
    whole: tokens of the view that the heads read. numbers: of the batch that comes to the device.
    """

    tokens: Mapping[Row, float]
    raw: Mapping[str, float]
    pairs: float
    spread: float
    pools: float
    whole: float
    numbers: float

    @property
    def total(self) -> float:
        """Tokens in the trunk."""
        return sum(self.tokens.values())


def mixture(shape: ModelShape) -> dict[str, float]:
    """Drawing task -> probability that a sample is of it."""
    sizes = {task.name: task.samples ** (1 / shape.config.data.temperature) for task in shape.data.drawing}
    total = sum(sizes.values())
    return {name: size / total for name, size in sizes.items()}


def workload(shape: ModelShape) -> Workload:
    """The mean over the mixture."""
    tokens = dict.fromkeys(shape.rows, 0.0)
    raw = dict.fromkeys(shape.data.names, 0.0)
    pairs = square = mean = pools = whole = numbers = 0.0
    shares = mixture(shape)
    for task in shape.data.drawing:
        share = shares[task.name]
        one = _of_task(shape, task)
        for name, count in one.tokens.items():
            tokens[name, task.name if shape.tasks else None] += share * count
        for name, count in one.raw.items():
            raw[name] += share * count
            numbers += share * one.present[name] * kinds.numbers(_signal(shape, name), shape.data.lengths[name])
        pairs += share * one.pairs
        square += share * (one.variance + one.whole**2)
        mean += share * one.whole
        whole += share * one.whole
        pools += share * one.whole * sum(other.group == task.name for other in shape.data.tasks)
    spread = max(square - mean**2, 0.0) ** 0.5
    return Workload(tokens, raw, pairs, spread, pools / max(whole, 1e-9), whole, numbers)


@dataclass(frozen=True, slots=True)
class _Sample:
    tokens: dict[str, float]
    raw: dict[str, float]
    present: dict[str, float]
    pairs: float
    variance: float
    whole: float


def _of_task(shape: ModelShape, task: TaskShape) -> _Sample:
    """A mean sample of a task; whether it has one modality is taken to say nothing about another."""
    model = shape.model
    drop = shape.config.data.modality_dropout if len(task.modalities) > 1 else 0.0
    present = {name: task.present.get(name, 1.0) * (1 - drop) for name in task.modalities}
    raw, own, variance = {}, {}, 0.0
    for name in task.modalities:
        mean, deviation = task.tokens[name]
        kept = 1 - float(_signal(shape, name).options.get("dropout") or 0.0)
        raw[name] = present[name] * mean * kept
        mean, deviation = (model.latents, 0.0) if model.latents else (mean * kept, deviation * kept)
        own[name] = present[name] * mean
        variance += present[name] * (deviation**2 + mean**2) - own[name] ** 2
        if model.missing.kind != "none":
            own[name] += 1 - present[name]
    whole = sum(own.values())
    views, alone = _views(shape)
    several = len(task.modalities) > 1
    tokens = {name: count * (views + alone * several) for name, count in own.items()}
    lonely = sum(present[name] * ((task.tokens[name][0]) ** 2 + task.tokens[name][1] ** 2) for name in task.modalities)
    pairs = views * (variance + whole**2) + alone * several * lonely
    return _Sample(tokens, raw, present, pairs, variance, whole)


def _views(shape: ModelShape) -> tuple[int, int]:
    """Whole views of a sample that the trunk reads, and whether each modality alone too: see objectives/pretext.py."""
    on = set(label_free(shape.config.objectives))
    if not on:
        return 1, 0
    whole = {"clean"} if is_on(shape.config.objectives.supervised) or "similarity" in on else set()
    whole |= {"masked"} if on & {"masked", "similarity"} else set()
    whole |= {"replaced"} if "replaced" in on else set()
    return len(whole), int("contrastive" in on)


def _signal(shape: ModelShape, name: str) -> kinds.Signal:
    return next(signal for signal in shape.data.signals if signal.name == name)
