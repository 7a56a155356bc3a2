"""What the files of a run hold together: the tasks, and the modalities that they share by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TargetKind = Literal["classification", "multilabel", "regression"]
SPLITS = {"train": 0, "val": 1, "test": 2, "ood": 3}
NO_SPLIT = 255
"""Split of every sample of a file without /split, which can be predicted and nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityInfo:
    """A modality as the files describe it.

    shape: of one sample, without the ragged axis: image (C, H, W), video (T, C, H, W), ragged series (F,), text ().
    """

    name: str
    kind: str
    ragged: bool
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    layout: str | None = None
    rate_hz: float | None = None
    unit: str | None = None
    channels: tuple[str, ...] = ()
    num_names: tuple[str, ...] = ()
    cat_names: tuple[str, ...] = ()
    cat_sizes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """A task: one label of one file.

    outputs: classes, or target columns of a regression.
    modalities: names after renaming, in alphabetical order of the names in the file.
    stored: the names of the same modalities in the file; empty where they are the same.
    sizes: split name -> number of samples.
    drawn_with: the task whose samples bring this one's label along (`data.joint_labels`); None: it draws its own.
    bags: data set of the file whose equal values mark samples of one thing, of which `together` are drawn one after the
        other; None: each is its own.
    """

    name: str
    file: str
    label: str
    target: TargetKind
    outputs: int
    metric: str
    modalities: tuple[str, ...]
    sizes: dict[str, int]
    class_names: tuple[str, ...] = ()
    weight: float = 1.0
    stored: tuple[str, ...] = ()
    drawn_with: str | None = None
    bags: str | None = None
    together: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """All tasks and modalities of a run, in one fixed order (that of the config) on every rank."""

    tasks: tuple[TaskInfo, ...]
    modalities: tuple[ModalityInfo, ...]

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """See task_groups."""
        return task_groups(self.tasks)


def task_groups(tasks: Sequence[TaskInfo]) -> tuple[tuple[int, ...], ...]:
    """Positions of the tasks that share each sample, that which draws it first; most groups hold one task."""
    groups = {task.name: [number] for number, task in enumerate(tasks) if task.drawn_with is None}
    for number, task in enumerate(tasks):
        if task.drawn_with is not None:
            groups[task.drawn_with].append(number)
    return tuple(map(tuple, groups.values()))
