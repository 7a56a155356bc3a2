"""Predictions for samples in memory or in a file: what a trained model is for. n samples, C classes, labels or target
columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moemm.config.suggest import did_you_mean
from moemm.data.catalogue import TaskInfo
from moemm.data.given import ALL, blank
from moemm.data.pack import Packer
from moemm.data.sample import Sample, Value
from moemm.errors import ConfigError, DataError
from moemm.evaluate.answers import chosen_of, named, scores_of
from moemm.evaluate.given import FilePredictions, predict_file
from moemm.evaluate.run import TrainedRun
from moemm.evaluate.scoring import inferring, pass_over
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
    """A trained model that answers for samples, in memory or in a file; needs no DeepSpeed and no process group."""

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
        batches = (self._packer(given[first : first + batch_size]) for first in range(0, len(given), batch_size))
        device = next(self.model.parameters()).device
        with inferring(self.model):
            output_nC = pass_over(self.model, batches, [info], device=device).outputs[info.name]
        answers = named(info, chosen_of(info, output_nC))
        return [Prediction(info.name, *one) for one in zip(scores_of(info, output_nC), answers, strict=True)]

    def predict_file(
        self,
        path: Path | str,
        *,
        task: str | None = None,
        split: str = ALL,
        missing: Sequence[str] = (),
        batch_size: int = 256,
    ) -> FilePredictions:
        """A prediction for each sample of a data file, which needs neither labels nor a split.

        task: name of the task; that which the file names when not given. split: `all`, or one that the file has.
        missing: modalities to take away. What is raised: as `predict_file` of moemm/evaluate/given.py.
        """
        return predict_file(self.run, path, task=task, split=split, missing=missing, batch_size=batch_size)

    def _task(self, name: str | None) -> TaskInfo:
        if name is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if name not in self.tasks:
            near = did_you_mean(name or "", self.tasks)
            given = "no task was given" if name is None else f"there is no task {name!r}{near}"
            raise ConfigError(f"{given}; this model has {', '.join(self.tasks)}: predict(samples, task=...)")
        return self.tasks[name]


def _sample(task: TaskInfo, number: int, values: Mapping[str, Value]) -> Sample:
    for name in values:
        if name not in task.modalities:
            raise DataError(
                f"sample {number} has the modality {name!r}, which task {task.name} does not know"
                f"{did_you_mean(name, task.modalities)}\n  allowed: {', '.join(task.modalities)}"
            )
    if not values:
        raise DataError(f"sample {number} has no modality\n  allowed: one or more of {', '.join(task.modalities)}")
    return Sample(task.name, number, dict(values), blank(task))
