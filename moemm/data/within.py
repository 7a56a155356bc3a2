"""Labels of training samples that batches are drawn within (`data.within`): a file with a tensor for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moemm.config.suggest import missing_path
from moemm.data.catalogue import Catalogue
from moemm.errors import DataError


def write_within(path: Path, labels: Mapping[str, np.ndarray]) -> None:
    """labels: task -> (n,) int64, of each sample of its train split in the file's order. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(values, np.int64) for name, values in labels.items()}, path)


def read_within(path: Path, catalogue: Catalogue, groups: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """(n,) int64 labels of the train split of each group's first task, which draws its samples.

    Raises DataError: no such file, another format, a task that it lacks, or another number of samples.
    """
    if not path.is_file():
        raise DataError(f"data.within: {missing_path(path, what='file of labels')}")
    try:
        stored = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise DataError(
            f"data.within: {path} is no file of labels: {error}\n"
            "  allowed: what moemm upcycle --method multiplet writes\n  to do: leave the key out, or put the file back"
        ) from error
    found = []
    for first, *_ in groups:
        task = catalogue.tasks[first]
        wanted, values = task.sizes["train"], stored.get(task.name)
        if values is None or values.shape != (wanted,) or values.dtype != np.int64:
            has = "nothing" if values is None else f"{values.dtype} of shape {tuple(values.shape)}"
            raise DataError(
                f"data.within: {path} has {has} for task {task.name}\n"
                f"  allowed: int64, a label for each of its {wanted} training samples\n"
                "  to do: make the labels anew for this data"
            )
        found.append(values)
    return found
