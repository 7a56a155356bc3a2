"""Predictions for samples in memory: what a trained model is for. n samples, C classes, labels or target columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moemm.config.suggest import did_you_mean
from moemm.data.catalogue import TaskInfo
from moemm.data.pack import Packer, target_shape
from moemm.data.sample import Sample, Value
from moemm.errors import ConfigError, DataError
from moemm.evaluate.run import TrainedRun
from moemm.modalities import prepare_functions


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says of one sample.

    scores: (C,) float32. Probabilities of the classes, which add up to 1; of each label of a multilabel task; values of
    a regression in the target's unit.
    answer: name of the likeliest class; names of the labels above one half; the value, or a list of several columns'.
    Classes without names are numbers.
    """

    task: str
    scores: np.ndarray
    answer: Any


class Predictor:
    """A trained model that answers for samples in memory; needs no DeepSpeed, no process group and no data file."""

    def __init__(self, run: TrainedRun) -> None:
        self.run, self.model = run, run.model
        self._packer = Packer(run.catalogue, prepare_functions(run.specs))

    @property
    def tasks(self) -> dict[str, TaskInfo]:
        """What it can be asked, by name."""
        return {task.name: task for task in self.run.catalogue.tasks}

    def __call__(self, samples: Sequence[Mapping[str, Value]], *, task: str | None = None) -> list[Prediction]:
        """`predict`."""
        return self.predict(samples, task=task)

    def predict(
        self, samples: Sequence[Mapping[str, Value]], *, task: str | None = None, batch_size: int = 256
    ) -> list[Prediction]:
        """A prediction for each sample, in their order.

        samples: modality -> value as data files hold it: an array of the modality's shape and dtype, text as str, a
        `Table`. What a sample lacks is left out, never zeros.
        task: name of the task; may be left out where there is one.
        Raises ConfigError for a task, DataError for a modality or value that the model does not know.
        """
        info = self._task(task)
        given = [_sample(info, number, values) for number, values in enumerate(samples)]
        batches = (given[first : first + batch_size] for first in range(0, len(given), batch_size))
        return [_prediction(info, row_C) for batch in batches for row_C in self._outputs(info, batch)]

    def _task(self, name: str | None) -> TaskInfo:
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            near = did_you_mean(name or "", self.tasks)
            given = "no task was given" if name is None else f"there is no task {name!r}{near}"
            raise ConfigError(f"{given}; this model has {', '.join(self.tasks)}: predict(samples, task=...)")
        return self.tasks[name]

    def _outputs(self, task: TaskInfo, samples: Sequence[Sample]) -> Iterator[torch.Tensor]:
        device = next(self.model.parameters()).device
        with torch.no_grad():
            yield from self.model(self._packer(samples).to(device)).outputs[task.name].float().cpu()


def _sample(task: TaskInfo, number: int, values: Mapping[str, Value]) -> Sample:
    for name in values:
        if name not in task.modalities:
            raise DataError(
                f"sample {number} has the modality {name!r}, which task {task.name} does not know"
                f"{did_you_mean(name, task.modalities)}\n  allowed: {', '.join(task.modalities)}"
            )
    if not values:
        raise DataError(f"sample {number} has no modality\n  allowed: one or more of {', '.join(task.modalities)}")
    shape = target_shape(task, 1)[1:]
    return Sample(task.name, number, dict(values), np.zeros(shape, np.float32) if shape else 0)


def _prediction(task: TaskInfo, row_C: torch.Tensor) -> Prediction:
    if task.target == "classification":
        scores = row_C.softmax(-1).numpy()
        return Prediction(task.name, scores, _name(task, int(scores.argmax())))
    if task.target == "multilabel":
        scores = row_C.sigmoid().numpy()
        return Prediction(task.name, scores, [_name(task, label) for label in np.flatnonzero(scores > 0.5).tolist()])
    values = row_C.tolist()
    return Prediction(task.name, row_C.numpy(), values[0] if len(values) == 1 else values)


def _name(task: TaskInfo, label: int) -> str | int:
    return task.class_names[label] if task.class_names else label
