"""Predictions for a data file, in the same pass as scores are made of. n samples, C classes, labels or columns."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moemm.config.suggest import did_you_mean, missing_path
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.file import DataFile
from moemm.data.given import ALL, GivenSamples, Matched, match_modalities
from moemm.data.loader import one_pass
from moemm.errors import ConfigError, DataError
from moemm.evaluate.answers import chosen_of, scores_of
from moemm.evaluate.metrics import accuracy, score
from moemm.evaluate.run import TrainedRun
from moemm.evaluate.scoring import inferring, pass_over
from moemm.modalities import prepare_functions


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePredictions:
    """What a model says of the samples of a file.

    run, step: of the model. data: the file; split: of it, or `all`. matched: modalities that were read, and were not.
    index: (n,) positions in the file. outputs: (n, C) as the model gives them. targets: of the same samples, as the
    file has them; None where it has none that can be compared, and `unlabelled` says why.
    skipped: samples without any of the modalities, for which there is no prediction. seconds: of the pass.
    """

    run: Path
    step: int
    task: TaskInfo
    data: str
    split: str
    matched: Matched
    index: np.ndarray
    outputs: np.ndarray
    targets: np.ndarray | None
    unlabelled: str
    skipped: int
    seconds: float

    @property
    def scores(self) -> np.ndarray:
        """(n, C) float32: probabilities of classes or labels; values of a regression, in the label's unit."""
        return scores_of(self.task, self.outputs)

    @property
    def chosen(self) -> np.ndarray:
        """(n,) int64 classes; (n, C) bool labels above one half; (n, C) float32 values of a regression."""
        return chosen_of(self.task, self.outputs)

    def metrics(self) -> dict[str, float]:
        """The task's metric, and the accuracy of a classification, where the file has labels; without those that these
        samples do not define.
        """  # fmt: skip
        if self.targets is None:
            return {}
        found = {self.task.metric: score(self.task, self.outputs, self.targets)}
        if self.task.target == "classification":
            found["accuracy"] = accuracy(self.outputs, self.targets)
        return {name: value for name, value in found.items() if np.isfinite(value)}


def predict_file(
    run: TrainedRun,
    path: Path | str,
    *,
    task: str | None = None,
    split: str = ALL,
    missing: Sequence[str] = (),
    batch_size: int = 256,
) -> FilePredictions:
    """A prediction for each sample of a data file that has one of the task's modalities.

    run: as `moemm.load` or `load_run` give it. task: name of the task; that which the file names when not given.
    missing: modalities to take away, by their names in the model or in the file.
    Of a split that the run was evaluated on, and batches of the same size, outputs are those that were scored.
    Raises ConfigError: no such task or modality. DataError: a broken file; modalities that the task does not know, or
    knows in another form; a split that the file has not.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size}: must be at least 1")
    if not os.path.exists(path):
        raise DataError(missing_path(Path(path), what="data file"))
    with DataFile(path, labelled=False) as file:
        info = choose_task(run.catalogue, file, task)
        chosen = any(one.name == info.name and one.modalities is not None for one in run.config.data.tasks)
        matched = match_modalities(run.catalogue, info, file, drop=missing, chosen=chosen)
        given = GivenSamples(file, _sharing(run.catalogue, info), matched.names, split=split)
        batches = one_pass(run.catalogue, given, batch_size=batch_size, prepare=prepare_functions(run.specs))
        if batches.num_skipped == len(given):
            raise DataError(
                f"{file.path}: none of its {len(given)} samples has a value of {', '.join(matched.names)}\n"
                "  allowed: at least one modality a sample\n  to do: look at the file with `moemm data inspect`"
            )
        start = time.perf_counter()
        with inferring(run.model):
            device = next(run.model.parameters()).device
            passed = pass_over(run.model, batches, [info], device=device)
        seconds = time.perf_counter() - start
        targets, why = _targets(file, info)
        return FilePredictions(
            run=run.folder, step=run.step, task=info, data=file.path, split=split, matched=matched,
            index=passed.index, outputs=passed.outputs[info.name],
            targets=None if targets is None else targets[passed.index], unlabelled=why,
            skipped=batches.num_skipped, seconds=seconds,
        )  # fmt: skip


def choose_task(catalogue: Catalogue, file: DataFile, asked: str | None) -> TaskInfo:
    """The task that was asked for, or that the file names. Raises ConfigError that names the known ones."""
    tasks = {task.name: task for task in catalogue.tasks}
    name = asked if asked is not None else file.info.task
    if name in tasks:
        return tasks[name]
    near = did_you_mean(name, tasks)
    if asked is not None:
        raise ConfigError(f"--task {asked}: this model has no such task{near}\n  allowed: {', '.join(tasks)}")
    raise ConfigError(
        f"{file.path} names the task {name!r}, which this model does not have{near}\n  allowed: {', '.join(tasks)}\n"
        "  to do: say which of them is to be predicted: --task NAME"
    )


def _sharing(catalogue: Catalogue, task: TaskInfo) -> list[TaskInfo]:
    """The tasks that share their samples with this one, that which draws them first: so they are evaluated, too."""
    for group in catalogue.groups:
        tasks = [catalogue.tasks[number] for number in group]
        if task in tasks:
            return tasks
    raise AssertionError("every task is in a group")


def _targets(file: DataFile, task: TaskInfo) -> tuple[np.ndarray | None, str]:
    """Targets of all samples of the file, or None and why they cannot be compared."""
    labels = file.info.labels
    if not labels:
        return None, "the file has no labels"
    if task.label not in labels:
        return None, f"the file has no data set {task.label}, only {', '.join(labels)}"
    label = labels[task.label]
    if label.target != task.target:
        return None, f"{task.label} of the file is a {label.target}, the task a {task.target}"
    classes = task.target == "classification"
    if label.class_names and task.class_names and label.class_names != task.class_names:
        return None, f"{task.label} of the file has other class names than the task, or in another order"
    if label.outputs > task.outputs or (label.outputs < task.outputs and not classes):
        what = "classes" if classes else "columns"
        return None, f"{task.label} of the file has {label.outputs} {what}, the task {task.outputs}"
    return file.targets(task.label), ""
