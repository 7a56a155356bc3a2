"""Scores of a model over whole splits, on any number of ranks, also with modalities taken away. C outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moemm.data import eval_loader
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.sample import PackedBatch, Prepare
from moemm.errors import ConfigError
from moemm.evaluate.metrics import score

Gather = Callable[[Any], list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """value of `metric` over n samples; None where no sample of the task has a modality left."""

    metric: str
    value: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What to score and how: the split, what its values are prepared with, which modalities are taken away.

    tasks: names of those to score; all when None.
    rank, world_size, gather: this rank's share, and a function that gives every rank the objects of all ranks.
    """

    split: str
    prepare: Prepare
    drop: Sequence[str] = ()
    tasks: Sequence[str] | None = None
    batch_size: int = 256
    device: torch.device | str = "cpu"
    rank: int = 0
    world_size: int = 1
    gather: Gather | None = None


def evaluate_model(model: nn.Module, catalogue: Catalogue, plan: EvaluationPlan) -> dict[str, TaskScore]:
    """task -> score on the plan's split; every rank gets the scores of all samples.

    Every rank calls the model equally often (ZeRO-3 needs that). The model's mode and the random state are as before.
    Raises ConfigError where `drop` names a modality that the catalogue lacks.
    """
    names = [info.name for info in catalogue.modalities]
    unknown = [name for name in plan.drop if name not in names]
    if unknown:
        raise ConfigError(f"--missing {unknown[0]}: no such modality; this run has {', '.join(names)}")
    with inferring(model):
        found: dict[str, TaskScore] = {}
        for group in catalogue.groups:
            found |= _score_group(model, catalogue, [catalogue.tasks[number] for number in group], plan)
        return {task.name: found[task.name] for task in catalogue.tasks if task.name in found}


@contextmanager
def inferring(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradients; afterwards the model's mode is as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def scores_to_dict(scores: dict[str, TaskScore]) -> dict[str, dict[str, Any]]:
    """Scores as JSON types."""
    return {name: asdict(value) for name, value in scores.items()}


def _score_group(
    model: nn.Module, catalogue: Catalogue, group: Sequence[TaskInfo], plan: EvaluationPlan
) -> dict[str, TaskScore]:
    """Scores of those tasks of a group that the plan wants; they share one pass over the samples."""
    tasks = [task for task in group if plan.tasks is None or task.name in plan.tasks]
    if not tasks:
        return {}
    drawn = tasks[0] if len(tasks) == 1 else group[0]  # what is drawn for the first has the targets of all
    if not set(drawn.modalities) - set(plan.drop):
        return {task.name: TaskScore(metric=task.metric, value=None, n=0) for task in tasks}
    predicted = _predict(model, catalogue, tasks, drawn, plan)
    return {task.name: _score(task, *predicted[task.name], plan) for task in tasks}


def _score(task: TaskInfo, output: np.ndarray, target: np.ndarray, plan: EvaluationPlan) -> TaskScore:
    if plan.gather is not None:
        parts = plan.gather((output, target))
        output, target = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    value = score(task, output, target)
    return TaskScore(metric=task.metric, value=value if np.isfinite(value) else None, n=len(target))


def _predict(
    model: nn.Module, catalogue: Catalogue, tasks: Sequence[TaskInfo], drawn: TaskInfo, plan: EvaluationPlan
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """task -> (n, C) outputs and the targets of this rank's share."""
    loader = eval_loader(
        catalogue,
        task=drawn.name,
        split=plan.split,
        batch_size=plan.batch_size,
        prepare=plan.prepare,
        drop=plan.drop,
        rank=plan.rank,
        world_size=plan.world_size,
    )
    passed = pass_over(model, loader, tasks, device=plan.device)
    return {task.name: (passed.outputs[task.name], passed.targets[task.name]) for task in tasks}


@dataclass(frozen=True, slots=True)
class Passed:
    """Of each task (n, C) outputs and the targets of all samples of a pass, and (n,) their positions in the file."""

    outputs: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]
    index: np.ndarray


def pass_over(
    model: nn.Module, batches: Iterable[PackedBatch], tasks: Sequence[TaskInfo], *, device: torch.device | str
) -> Passed:
    """What the model says of every sample, in their order; call it inside `inferring`."""
    outputs = {task.name: [np.zeros((0, task.outputs), np.float32)] for task in tasks}
    targets: dict[str, list[np.ndarray]] = {task.name: [] for task in tasks}
    index = [np.zeros(0, np.int64)]
    for batch in batches:
        found = model(batch.to(device)).outputs
        index.append(batch.index.numpy())
        for name in outputs:
            outputs[name].append(found[name].float().cpu().numpy())
            targets[name].append(batch.targets[name].cpu().numpy())
    none = np.zeros(0, np.int64)
    return Passed(
        {name: np.concatenate(parts) for name, parts in outputs.items()},
        {name: np.concatenate(parts) if parts else none for name, parts in targets.items()},
        np.concatenate(index),
    )
