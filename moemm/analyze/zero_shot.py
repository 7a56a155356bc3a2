"""The one-minute rule: what a trained run loses where a modality's tokens run through the experts of another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from moemm.analyze.bits import bits
from moemm.analyze.matrix import Transfer
from moemm.analyze.units import draw, pack
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.errors import DataError
from moemm.evaluate import TrainedRun
from moemm.moe import redirected

Cell = tuple[TaskInfo, list[PackedBatch]]


def exchange_experts(
    run: TrainedRun, *, samples: int = 256, tell: Callable[[str], None] = lambda line: None
) -> tuple[Transfer, dict[str, dict[str, dict[str, float]]]]:
    """Bits a sample of split val that a target loses through the source's modality experts, zero-shot.

    The samples are those of each task that have the target, up to `samples`, with all that they have. Returns the mean
    over tasks, and {target: {task: {source: bits}}}. tell: gets a line about each target.
    Raises ConfigError for a model without modality experts, DataError for a modality without samples in val.
    """
    names = [info.name for info in run.catalogue.modalities]
    loss_ST = np.zeros((len(names), len(names)))
    by_task = {}
    for column, target in enumerate(names):
        cells = _cells(run, target, samples)
        found = {task.name: _losses(run.model, task, batches, target, names) for task, batches in cells}
        loss_ST[:, column] = np.mean([[one[source] for source in names] for one in found.values()], axis=0)
        by_task[target] = found
        tell(f"{column + 1} of {len(names)}: {target} through the experts of the others")
    return Transfer("zero-shot", tuple(names), loss_ST), by_task


def _cells(run: TrainedRun, target: str, samples: int) -> list[Cell]:
    """The tasks that have the target, with batches of split val."""
    cells = []
    for task in run.catalogue.tasks:
        if target in task.modalities:
            drawn = draw(run.catalogue, task, "val", [target], samples, run.config.train.seed)
            if drawn:
                cells.append((task, pack(run.catalogue, run.specs, drawn, size=128)))
    if not cells:
        raise DataError(
            f"no sample of split val has {target}: its loss cannot be measured\n"
            "  allowed: modalities that some sample of val has\n  to do: mark samples of it for val"
        )
    return cells


@torch.no_grad()
def _losses(
    model: nn.Module, task: TaskInfo, batches: list[PackedBatch], target: str, sources: list[str]
) -> dict[str, float]:
    """source -> bits lost against the target's own experts."""
    label = torch.cat([batch.targets[task.name] for batch in batches])

    def through(source: str) -> float:
        with redirected(model, {target: source}):
            return bits(task, torch.cat([model(batch).outputs[task.name] for batch in batches]), label)

    own = through(target)
    return {source: 0.0 if source == target else through(source) - own for source in sources}
