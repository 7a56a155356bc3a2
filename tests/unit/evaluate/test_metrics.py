"""Metrics against hand-made cases, and the refusals."""

from __future__ import annotations

import numpy as np
import pytest

from moemm.data.catalogue import TaskInfo
from moemm.errors import DataError
from moemm.evaluate import METRICS, score


def task(metric: str, target: str = "classification", outputs: int = 2) -> TaskInfo:
    return TaskInfo(
        name="t", file="t.h5", label="label", target=target, outputs=outputs, metric=metric, modalities=("x",), sizes={}
    )


LOGITS = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.5], [0.2, 0.1]])
TARGET = np.array([0, 1, 1, 0])


def test_accuracy_auc_and_f1() -> None:
    assert score(task("accuracy"), LOGITS, TARGET) == 0.75
    # Margins -1, 3, -.5, -.1: of the four pairs (positive, negative) the pairs (-.5, -.1) alone is in the wrong order.
    assert score(task("auc"), LOGITS, TARGET) == 0.75
    assert score(task("macro_f1"), LOGITS, TARGET) == pytest.approx((0.8 + 2 / 3) / 2)


def test_ties_count_half_in_auc() -> None:
    assert score(task("auc"), np.zeros((4, 2)), TARGET) == 0.5


def test_regression_takes_flat_targets_without_broadcasting() -> None:
    output, target = np.array([[1.0], [2.0], [3.0]]), np.array([1.0, 2.0, 6.0])
    assert score(task("mae", "regression", 1), output, target) == pytest.approx(1.0)
    assert score(task("rmse", "regression", 1), output, target) == pytest.approx(3**0.5)


def test_multilabel_leaves_out_columns_without_a_positive() -> None:
    output = np.array([[0.9, 0.1, 0.3], [0.2, 0.8, 0.1]])
    target = np.array([[1, 0, 0], [0, 1, 0]], dtype=np.float32)
    assert score(task("map", "multilabel", 3), output, target) == 1.0


def test_nothing_to_score_is_nan_not_zero() -> None:
    assert np.isnan(score(task("accuracy"), np.zeros((0, 2)), np.zeros(0)))
    assert np.isnan(score(task("auc"), LOGITS, np.ones(4))), "one class only"


@pytest.mark.parametrize(
    ("metric", "target", "message"),
    [
        ("acuracy", "classification", "'acuracy'.*accuracy, auc, macro_f1"),
        ("accuracy", "regression", "target is regression.*rmse, mae"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(metric: str, target: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(task(metric, target, 1), np.zeros((2, 1)), np.zeros(2))


def test_auc_of_three_classes_is_refused() -> None:
    with pytest.raises(DataError, match="needs 2 classes, this task has 3"):
        score(task("auc", outputs=3), np.zeros((2, 3)), np.zeros(2))


def test_every_metric_is_for_one_kind_of_target() -> None:
    assert {kind for _, kind in METRICS.values()} == {"classification", "multilabel", "regression"}
