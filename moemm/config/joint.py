"""Tasks that differ in their label alone: with `data.joint_labels` they share each sample."""

from __future__ import annotations

import os
from collections.abc import Iterator

from moemm.config.problem import Problem
from moemm.config.schema import Config, DataConfig, TaskConfig


def joint_groups(data: DataConfig) -> list[list[TaskConfig]]:
    """The tasks that share each sample, the first of them draws it; each task alone without `data.joint_labels`.

    Together are those of equal file, rename, modalities and bags, as the configuration writes them (in any order).
    """
    if not data.joint_labels:
        return [[task] for task in data.tasks]
    groups: dict[object, list[TaskConfig]] = {}
    for task in data.tasks:
        groups.setdefault(samples_of(task), []).append(task)
    return list(groups.values())


def samples_of(task: TaskConfig) -> tuple[object, ...]:
    """What decides the samples of a task: all but its label, name and weight."""
    modalities = None if task.modalities is None else tuple(sorted(task.modalities))
    return os.path.normpath(task.file), modalities, tuple(sorted(task.rename.items())), task.bags, task.together


def check_joint(config: Config) -> Iterator[Problem]:
    """Joint labels that join nothing, and experts that ask which one task a sample is of."""
    data, joint = config.data, [group for group in joint_groups(config.data) if len(group) > 1]
    if data.joint_labels and not joint:
        message = f"joins nothing: no two tasks have the same file, rename, modalities and bags{_nearly(data)}"
        allowed = "false, or two tasks that differ in name and label alone"
        yield Problem(path=("data", "joint_labels"), message=message, given=True, allowed=allowed)
    for number, group in enumerate(config.model.experts.groups):
        if group.tasks is not None and joint:
            names = " and ".join(task.name for task in joint[0])
            message = f"asks for the one task of a sample; with data.joint_labels a sample is of {names} at once"
            path = ("model", "experts", "groups", number, "tasks")
            allowed = "none: leave out `tasks`, or data.joint_labels"
            yield Problem(path=path, message=message, given=group.tasks, allowed=allowed)


def _nearly(data: DataConfig) -> str:
    """Two tasks over one file that are not joined, if there are some."""
    first: dict[str, TaskConfig] = {}
    for task in data.tasks:
        other = first.setdefault(os.path.normpath(task.file), task)
        if other is not task:
            return f" ({other.name} and {task.name} share {task.file}, but differ in rename, modalities or bags)"
    return ""
