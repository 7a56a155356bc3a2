"""What the outputs of a model say: probabilities and names of classes, labels, values. n samples, C outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moemm.data.catalogue import TaskInfo


def scores_of(task: TaskInfo, output_nC: np.ndarray) -> np.ndarray:
    """(n, C) float32: probabilities of the classes, of each label; values of a regression as they are."""
    output = torch.from_numpy(output_nC)
    if task.target == "classification":
        return output.softmax(-1).numpy()
    return output.sigmoid().numpy() if task.target == "multilabel" else output_nC


def chosen_of(task: TaskInfo, output_nC: np.ndarray) -> np.ndarray:
    """(n,) int64: the class that metrics count; (n, C) bool: labels above one half; (n, C) values of a regression.

    By the outputs: two that differ may have the same probability.
    """
    if task.target == "classification":
        return output_nC.argmax(1)
    return output_nC > 0 if task.target == "multilabel" else output_nC


def named(task: TaskInfo, chosen: np.ndarray) -> list[Any]:
    """Rows of `chosen_of`, or targets, for people: a class by its name, a list of labels, a value or a list of them."""
    if task.target == "classification":
        return [class_of(task, number) for number in chosen.tolist()]
    if task.target == "multilabel":
        return [[class_of(task, label) for label in np.flatnonzero(row).tolist()] for row in chosen]
    values = chosen.reshape(len(chosen), -1)
    return [shortest(row[0]) if len(row) == 1 else [shortest(value) for value in row] for row in values]


def class_of(task: TaskInfo, number: int) -> str | int:
    """The name of a class or label, its number where it has none."""
    return task.class_names[number] if task.class_names else number


def shortest(value: Any) -> float:
    """A float32 as the float with the fewest digits that means it: 0.1, not 0.10000000149011612."""
    return float(str(np.float32(value)))
