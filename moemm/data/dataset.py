"""One split of one task, sample by sample."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from moemm.data.catalogue import SPLITS, Catalogue, TaskInfo
from moemm.data.file import DataFile
from moemm.data.limits import refusal
from moemm.data.quarantine import BadSampleError, check
from moemm.data.sample import Sample, Value
from moemm.data.shared import find_task, numbered, open_shared
from moemm.errors import ConfigError, DataError


class SplitDataset:
    """The samples of one split of one task: `dataset[i]` is a Sample, i from 0 to len - 1 in the file's order.

    drop: names of modalities (of the run) to leave out. A sample that lacks all others comes without modalities.
    A sample of the first of several tasks that share it (`data.joint_labels`) holds the targets of all of them.
    Opens its file when first used, in each process. Raises ConfigError: no such task or split. DataError: broken data.
    """

    def __init__(self, catalogue: Catalogue, *, task: str, split: str, drop: Collection[str] = ()) -> None:
        self.task = find_task(catalogue, task)
        if split not in SPLITS:
            raise ConfigError(f"split {split!r} is none of {', '.join(SPLITS)}")
        self.split = split
        self._others = [one for one in catalogue.tasks if one.drawn_with == task]
        stored = self.task.stored or self.task.modalities
        self._names = [(run, name) for run, name in zip(self.task.modalities, stored, strict=True) if run not in drop]
        self._file: DataFile | None = None
        self._indices: np.ndarray | None = None
        self._bags: np.ndarray | None = None
        columns = [(one.file, one.bags) for one in catalogue.tasks]
        self._source = columns.index((self.task.file, self.task.bags))

    def __len__(self) -> int:
        return self.task.sizes[self.split]

    def __getitem__(self, item: int) -> Sample:
        index = int(self.indices[item])
        values = ((run, self._read(name, index)) for run, name in self._names)
        modalities = {run: value for run, value in values if value is not None}
        others = {task.name: self._target(task, index) for task in self._others}
        bag = None if self.bags is None else numbered(self._source, int(self.bags[item]))
        return Sample(self.task.name, index, modalities, self._target(self.task, index), others, bag)

    def _read(self, name: str, index: int) -> Value | None:
        try:
            return self.file.read(name, index)
        except DataError as error:
            key = f"/modalities/{name}"
            raise BadSampleError(str(error), file=self.task.file, key=key, index=index) from error

    def sound(self, item: int) -> Sample:
        """Sample `item`. Raises BadSampleError where it is broken, or has values that training cannot use."""
        return check(self[item], self.task.file, dict(self._names).__getitem__)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def open(self) -> None:
        """Opens the file now and checks the split; workers that are forked later share it."""
        assert len(self.indices) == len(self)
        assert self.bags is None or len(self.bags) == len(self)

    @property
    def file(self) -> DataFile:
        """The open file."""
        if self._file is None:
            self._file = open_shared(self.task.file)
        return self._file

    @property
    def indices(self) -> np.ndarray:
        """(n,) int64: the position of each sample in the file."""
        if self._indices is None:
            indices = np.flatnonzero(self.file.split == SPLITS[self.split])
            if len(indices) != len(self):
                found = f"split {self.split} has {len(indices)} samples, and had {len(self)} when the run was set up"
                do = "put the file back that the run began with, or start a new run"
                raise refusal(self.task.file, "/split", found, allowed="the file of this run, unchanged", do=do)
            self._indices = indices
        return self._indices

    @property
    def bags(self) -> np.ndarray | None:
        """(n,) int64: numbers that are equal for samples of one thing; None where the task has no `bags`."""
        if self._bags is None and self.task.bags is not None:
            self._bags = self.file.bags(self.task.bags)[self.indices]
        return self._bags

    @property
    def targets(self) -> np.ndarray:
        """Targets of the whole split: (n,) int64, (n,) float32, or (n, C) float32."""
        values = self.file.targets(self.task.label)[self.indices]
        return (
            values[:, 0] if self.task.target == "regression" and self.task.outputs == 1 and values.ndim == 2 else values
        )

    def present(self) -> np.ndarray:
        """(n,) bool: which samples have at least one modality that is not left out."""
        found = np.zeros(len(self), bool)
        for _, name in self._names:
            found |= self.file.present(name)[self.indices]
        return found

    def _target(self, task: TaskInfo, index: int) -> Any:
        value = self.file.targets(task.label)[index]
        if np.ndim(value) == 0:
            return value.item()
        return float(value[0]) if task.target == "regression" and task.outputs == 1 else value.copy()
