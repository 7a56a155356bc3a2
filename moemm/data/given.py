"""Any data file as samples for a task of a trained model: which of its modalities the task reads, of which split.

A file needs neither labels nor a split for this: targets are blanks of the right shape.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moemm.config.suggest import did_you_mean
from moemm.data.build import differing
from moemm.data.catalogue import SPLITS, Catalogue, TaskInfo
from moemm.data.file import DataFile
from moemm.data.limits import refusal
from moemm.data.pack import target_shape
from moemm.data.sample import Sample
from moemm.data.value import Target
from moemm.errors import ConfigError, DataError

ALL = "all"
"""Every sample of the file, whatever its split."""


@dataclass(frozen=True, slots=True)
class Matched:
    """How the modalities of a file stand to those of a task.

    names: name in the model -> name in the file, of those that are read. absent: of the task, but not in the file, or
    taken away. unread: in the file alone, and known to be left out.
    """

    names: dict[str, str]
    absent: tuple[str, ...]
    unread: tuple[str, ...]


def match_modalities(
    catalogue: Catalogue, task: TaskInfo, file: DataFile, *, drop: Collection[str] = (), chosen: bool = False
) -> Matched:
    """Which modality of the file is which of the task: by the names of the training file first, then by the model's.

    drop: modalities to take away, by either name. chosen: the task was trained on a choice of its file's modalities, so
    that the file may have others.
    Raises ConfigError: `drop` names none, or all. DataError: no modality that the task knows, one that it does not
    know, one of another kind, shape, rate ... than in training.
    """
    have = {info.name: info for info in file.modalities}
    stored = dict(zip(task.modalities, task.stored or task.modalities, strict=True))
    names = {run: name for run, name in stored.items() if name in have}
    names |= {run: run for run in stored if run not in names and run in have and run not in names.values()}
    _check_drop(drop, [*stored, *have], names)
    unknown = [name for name in have if name not in names.values() and name not in drop]
    if not names:
        _refuse(file, task, f"none of the modalities of task {task.name}, only {', '.join(have)}")
    if unknown and not chosen:
        near = did_you_mean(unknown[0], [run for run in stored if run not in names])
        _refuse(file, task, f"a modality {unknown[0]}, which task {task.name} does not know{near}", leave=unknown)
    read = {run: names[run] for run in stored if run in names and not {run, names[run]} & set(drop)}
    known = {info.name: info for info in catalogue.modalities}
    for run, name in read.items():
        differ = differing(known[run], have[name])
        if differ:
            shown = ", ".join(f"{key} {there}, and {here} in training" for key, here, there in differ)
            raise refusal(
                file.path, f"/modalities/{name}", shown, allowed="what the model was trained on, in the same form",
                do=f"write the file as the training data was written, or predict without it: --missing {name}",
            )  # fmt: skip
    return Matched(read, tuple(run for run in stored if run not in read), tuple(unknown))


def _check_drop(drop: Collection[str], known: Sequence[str], names: Mapping[str, str]) -> None:
    for name in drop:
        if name not in known:
            have = ", ".join(dict.fromkeys(known))
            raise ConfigError(f"--missing {name}: no such modality{did_you_mean(name, known)}; there are {have}")
    if names and all({run, name} & set(drop) for run, name in names.items()):
        raise ConfigError(
            f"--missing {','.join(drop)}: that leaves nothing to predict from; the file has {', '.join(names)}"
        )


def _refuse(file: DataFile, task: TaskInfo, found: str, *, leave: Sequence[str] = ()) -> None:
    do = f"predict without it: --missing {','.join(leave)}" if leave else "give a file with one of them"
    raise refusal(file.path, "/modalities", found, allowed=", ".join(task.modalities), do=do)


class GivenSamples:
    """`given[i]` is a Sample of the file, i from 0 to len - 1 in the file's order, drawn for the first of `tasks`.

    tasks: one, or all that share their samples, that which draws them first. names: see Matched.
    Raises DataError: a split that the file has not, or without samples.
    """

    def __init__(self, file: DataFile, tasks: Sequence[TaskInfo], names: Mapping[str, str], *, split: str) -> None:
        self._file, self._task, self._others = file, tasks[0], tasks[1:]
        self._names = dict(names)
        self.indices = _indices(file, split)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Sample:
        index = int(self.indices[item])
        values = ((run, self._file.read(name, index)) for run, name in self._names.items())
        modalities = {run: value for run, value in values if value is not None}
        others = {task.name: blank(task) for task in self._others}
        return Sample(self._task.name, index, modalities, blank(self._task), others)

    def present(self) -> np.ndarray:
        """(n,) bool: which samples have at least one modality that is read."""
        found = np.zeros(len(self), bool)
        for name in self._names.values():
            found |= self._file.present(name)[self.indices]
        return found


def blank(task: TaskInfo) -> Target:
    """A target of the task's shape, where there is none to tell."""
    shape = target_shape(task, 1)[1:]
    return np.zeros(shape, np.float32) if shape else 0


def _indices(file: DataFile, split: str) -> np.ndarray:
    """(n,) int64: positions of the split's samples in the file."""
    if split == ALL:
        return np.arange(len(file))
    if split not in SPLITS:
        raise ConfigError(f"split {split!r} is none of {ALL}, {', '.join(SPLITS)}")
    if not file.has_split:
        raise refusal(
            file.path, "/split", f"no split, so no samples of {split}", allowed=f"--split {ALL}",
            do="leave --split out; that takes every sample",
        )  # fmt: skip
    indices = np.flatnonzero(file.split == SPLITS[split])
    if not len(indices):
        filled = [name for name, number in SPLITS.items() if (file.split == number).any()]
        raise DataError(
            f"{file.path}: /split: no sample of split {split}\n"
            f"  allowed: {', '.join([ALL, *filled])}\n  to do: name one of these with --split"
        )
    return indices
