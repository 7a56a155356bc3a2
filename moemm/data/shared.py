"""Small things that catalogue, data sets and packing share: open files, tasks by name, one refusal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakValueDictionary

from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.file import DataFile
from moemm.data.storage import file_state
from moemm.errors import ConfigError, DataError

_open: WeakValueDictionary[tuple[str, tuple[int, ...]], DataFile] = WeakValueDictionary()
"""Open files of this process: tasks and splits of one file share what is decoded. A fork inherits it."""
_held: list[DataFile] = []
_holding = False


def open_shared(path: str) -> DataFile:
    """The DataFile of `path` that others in this process use too; it closes when the last of them lets go of it."""
    try:
        key = (path, file_state(os.stat(path)))
    except (OSError, ValueError):
        key = (path, ())  # DataFile says what is wrong
    file = _open.get(key)
    if file is None:
        file = _open[key] = DataFile(path)
    if _holding and file not in _held:
        _held.append(file)
    return file


@contextmanager
def held_open() -> Iterator[None]:
    """Files that `open_shared` opens stay open until this ends, with what was decoded of them."""
    global _holding
    outer, _holding = _holding, True
    try:
        yield
    finally:
        _holding = outer
        if not outer:
            _held.clear()


def numbered(source: int, place: int) -> int:
    """One number for each pair of a source (a task, a column of a file) and a place there, both not negative."""
    return (source << 40) + place


def find_task(catalogue: Catalogue, name: str) -> TaskInfo:
    """The task of that name. ConfigError: there is none."""
    for task in catalogue.tasks:
        if task.name == name:
            return task
    raise ConfigError(f"no task {name!r}; this run has {', '.join(task.name for task in catalogue.tasks)}")


def no_modality(task: TaskInfo, indices: Sequence[int]) -> DataError:
    """The refusal of samples that have no modality at all."""
    shown = ", ".join(map(str, indices[:5])) + (", ..." if len(indices) > 5 else "")
    return DataError(
        f"task {task.name}: {len(indices)} sample(s) of {task.file} have none of the modalities "
        f"{', '.join(task.modalities)}: index {shown}\n  allowed: at least one modality a sample\n"
        "  to do: leave these samples out of the file, or give the task more modalities in data.tasks"
    )
