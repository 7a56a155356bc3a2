"""What the files of a run hold together: the tasks, and the modalities that they share by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TargetKind = Literal["classification", "multilabel", "regression"]
SPLITS = {"train": 0, "val": 1, "test": 2, "ood": 3}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """All tasks and modalities of a run, in one fixed order (that of the config) on every rank."""

    tasks: tuple[TaskInfo, ...]
    modalities: tuple[ModalityInfo, ...]
