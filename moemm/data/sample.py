"""What flows from a file to the model: one `Sample`, and many of them as one `PackedBatch` without padding.

B samples of the batch, M modalities of the catalogue, n rows of one modality (at most B), C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from moemm.data.catalogue import TaskInfo
from moemm.data.value import Table as Table
from moemm.data.value import Target as Target
from moemm.data.value import Value as Value


@dataclass(slots=True)
class Sample:
    """One training example. A modality that the sample lacks is absent from `modalities`, never zeros.

    task: which the sample was drawn for; target: of it. others: of the tasks that share its samples.
    bag: number of what the sample shows, the same for all samples of one thing, not negative; None: it is its own.
    """

    task: str
    index: int
    modalities: dict[str, Value]
    target: Target
    others: dict[str, Target] = field(default_factory=dict)
    bag: int | None = None


@dataclass(slots=True)
class PackedModality:
    """The rows of one modality in one batch, joined without padding.

    fields: `data` for arrays and text ids, `num` and `cat` for tables.
        Fixed arrays and tables: (n, ...). Ragged arrays and text ids: (sum of lengths, ...).
    lengths: (n,) int64, rows of `data` that belong to each row of the batch; None where shapes are fixed.
    sample: (n,) int64, ascending: the row of the batch that each belongs to.
    """

    fields: dict[str, torch.Tensor]
    lengths: torch.Tensor | None
    sample: torch.Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedModality:
        """The same rows with `function` applied to every tensor (to a device, into pinned memory)."""
        lengths = None if self.lengths is None else function(self.lengths)
        return PackedModality({k: function(v) for k, v in self.fields.items()}, lengths, function(self.sample))


@dataclass(slots=True)
class PackedBatch:
    """A batch over all tasks: one ragged buffer a modality, who has what, and the targets.

    modalities: every modality of the catalogue in the catalogue's order, with zero rows where none has it.
    presence: (B, M) bool.
    task: (B,) int64, position in the catalogue's tasks of that which each sample was drawn for.
    index: (B,) int64, position in the task's file.
    bag: (B,) int64, equal for samples of one thing, in all batches.
    targets: task name -> targets of its samples in batch order: (n,) int64, (n,) or (n, C) float32.
        Every task of the catalogue has an entry, with zero rows where the batch has none of it. A sample has rows of
        several tasks where they share it: `rows_of` says whose rows they are.
    """

    modalities: dict[str, PackedModality]
    presence: torch.Tensor
    task: torch.Tensor
    index: torch.Tensor
    bag: torch.Tensor
    targets: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """B."""
        return self.task.shape[0]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> PackedBatch:
        """The same batch with `function` applied to every tensor."""
        packed = {name: modality.map(function) for name, modality in self.modalities.items()}
        targets = {name: function(target) for name, target in self.targets.items()}
        rest = {f.name: function(getattr(self, f.name)) for f in fields(self)[1:5]}
        return PackedBatch(modalities=packed, targets=targets, **rest)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`; copies from pinned memory do not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in pinned memory (called by the DataLoader)."""
        return self.map(torch.Tensor.pin_memory)


def rows_of(task_B: torch.Tensor, tasks: Sequence[TaskInfo], number: int) -> torch.Tensor:
    """(B,) bool: the samples that have targets and outputs of task `number`: drawn for it, or for the one before it.

    task_B: `PackedBatch.task`. tasks: those of the catalogue.
    """
    rows_B = task_B == number
    first = tasks[number].drawn_with
    return rows_B if first is None else rows_B | (task_B == [task.name for task in tasks].index(first))


Prepare = Mapping[str, Callable[[Value], Value]]
"""modality name -> function run on each value in the worker process (text -> ids, say)."""
