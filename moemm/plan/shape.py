"""The data of a run as plans see it: modalities with their tokens, tasks with their heads. Made by plan/source.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moemm.plan.kinds import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskShape:
    """A task. outputs: of its head. samples: of the train split. group: the task that draws its samples (itself, most
    times). tokens: modality -> (mean, deviation) tokens of a sample that has it. present: modality -> share of samples.
    """  # fmt: skip

    name: str
    outputs: int
    modalities: tuple[str, ...]
    samples: int
    group: str
    tokens: Mapping[str, tuple[float, float]]
    present: Mapping[str, float] = field(default_factory=dict)
    learn: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class DataShape:
    """All of it. lengths: modality -> mean length of the ragged axis (1 where there is none). source: whence, in words.
    """  # fmt: skip

    signals: tuple[Signal, ...]
    tasks: tuple[TaskShape, ...]
    lengths: Mapping[str, float]
    source: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the modalities."""
        return tuple(signal.name for signal in self.signals)

    @property
    def drawing(self) -> tuple[TaskShape, ...]:
        """The tasks that draw samples: the first of each group in which some task learns."""
        learns = {task.group for task in self.tasks if task.learn}
        return tuple(task for task in self.tasks if task.name == task.group and task.group in learns)
