"""Scores of predictions, by the name that a data file gives (`metric`). n samples, C outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moemm.data.catalogue import TargetKind, TaskInfo
from moemm.errors import DataError

Score = Callable[[np.ndarray, np.ndarray], float]


def accuracy(output_nC: np.ndarray, target_n: np.ndarray) -> float:
    """Share of samples whose largest output is the target."""
    return float((output_nC.argmax(1) == target_n).mean())


def auc(output_nC: np.ndarray, target_n: np.ndarray) -> float:
    """Area under the ROC curve of class 1 of 2; NaN where the samples hold one class only."""
    from sklearn.metrics import roc_auc_score

    if np.unique(target_n).size < 2:
        return float("nan")
    return float(roc_auc_score(target_n, output_nC[:, 1] - output_nC[:, 0]))


def macro_f1(output_nC: np.ndarray, target_n: np.ndarray) -> float:
    """F1 averaged over the classes that occur."""
    from sklearn.metrics import f1_score

    return float(f1_score(target_n, output_nC.argmax(1), average="macro", zero_division=0.0))


def mean_average_precision(output_nC: np.ndarray, target_nC: np.ndarray) -> float:
    """Average precision, averaged over the columns that have a positive."""
    from sklearn.metrics import average_precision_score

    used = target_nC.any(0)
    return float(average_precision_score(target_nC[:, used], output_nC[:, used])) if used.any() else float("nan")


def rmse(output_nC: np.ndarray, target: np.ndarray) -> float:
    """Root of the mean squared error, in the target's unit."""
    return float(np.sqrt(np.mean((output_nC - target.reshape(output_nC.shape)) ** 2)))


def mae(output_nC: np.ndarray, target: np.ndarray) -> float:
    """Mean absolute error, in the target's unit."""
    return float(np.mean(np.abs(output_nC - target.reshape(output_nC.shape))))


METRICS: dict[str, tuple[Score, TargetKind]] = {
    "accuracy": (accuracy, "classification"),
    "auc": (auc, "classification"),
    "macro_f1": (macro_f1, "classification"),
    "map": (mean_average_precision, "multilabel"),
    "rmse": (rmse, "regression"),
    "mae": (mae, "regression"),
}
LOWER_IS_BETTER = frozenset({"rmse", "mae"})


def direction(metric: str) -> int:
    """1 where a higher score is better, -1 where a lower one is."""
    return -1 if metric in LOWER_IS_BETTER else 1


def score(task: TaskInfo, output_nC: np.ndarray, target: np.ndarray) -> float:
    """The task's metric of its outputs; NaN for no samples.

    Raises DataError where the file names a metric that is not known, or that is for another kind of target.
    """
    function, kind = METRICS.get(task.metric, (None, None))
    if function is None or kind != task.target:
        fitting = ", ".join(name for name, (_, target_kind) in METRICS.items() if target_kind == task.target)
        raise DataError(
            f"{task.file}: attribute metric is '{task.metric}', but the target is {task.target}, which can be "
            f"scored by {fitting}: set the file's attribute to one of them"
        )
    if task.metric == "auc" and task.outputs != 2:
        raise DataError(f"{task.file}: metric auc needs 2 classes, this task has {task.outputs}: use accuracy")
    return function(output_nC, target) if len(target) else float("nan")
