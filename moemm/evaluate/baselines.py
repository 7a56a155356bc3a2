"""What scikit-learn reaches: the figure that a trained model has to be held against.

Every modality becomes one row of numbers. Early fusion joins the rows; late fusion fits a model a modality and adds up
their log-probabilities. Both with logistic regression and with a small network; the best on the val split is scored on
test. Deterministic for a seed; seconds a task.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from moemm.data.catalogue import ModalityInfo, TaskInfo
from moemm.data.sample import Sample, Table, Value
from moemm.evaluate.metrics import direction, score

MAX_NETWORK_COLUMNS = 1000
"""Joined columns up to which the network is tried."""
NUM_FRAMES = 12
"""Frames that a series is resampled to."""

Features = Callable[[Sequence[Value | None]], Any]


def baseline(
    task: TaskInfo, modalities: Sequence[ModalityInfo], splits: dict[str, list[Sample]], *, seed: int = 0
) -> dict[str, Any]:
    """{"model", "val", "test"} of the best of four scikit-learn models, trained on splits["train"].

    An absent modality is a row of zeros. Regression (ridge and a network) is fused early only.
    """
    columns = {info.name: _columns(info, splits) for info in modalities if info.name in task.modalities}
    targets = {name: np.asarray([sample.target for sample in part]) for name, part in splits.items()}
    best: dict[str, Any] = {}
    for name, outputs in _candidates(task, columns, targets["train"], seed=seed):
        scores = {split: score(task, outputs[split], targets[split]) for split in ("val", "test")}
        sign = direction(task.metric)
        if not best or sign * scores["val"] > sign * best["val"]:
            best = {"model": name, **scores}
    return best


def _candidates(
    task: TaskInfo, columns: dict[str, dict[str, Any]], target: np.ndarray, *, seed: int
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(name, outputs on val and test) of every model that is tried."""
    joined = {split: _join([part[split] for part in columns.values()]) for split in ("train", "val", "test")}
    # On thousands of columns the network takes minutes and is no better.
    wide = joined["train"].shape[1] > MAX_NETWORK_COLUMNS
    tried = [name for name in estimators(task, seed=seed) if name != "network" or not wide]
    for name in tried:
        early = _fit(estimators(task, seed=seed)[name], joined["train"], target)
        yield f"{name}, joined", {split: outputs_of(early, task, joined[split]) for split in ("val", "test")}
        if len(columns) > 1 and task.target == "classification":
            late = {split: np.zeros((joined[split].shape[0], task.outputs)) for split in ("val", "test")}
            for part in columns.values():
                single = _fit(estimators(task, seed=seed)[name], part["train"], target)
                for split, total in late.items():
                    total += np.log(outputs_of(single, task, part[split]) + 1e-9)
            yield f"{name}, late", late


def _fit(estimator: Any, features: Any, target: np.ndarray) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "did not converge" is no news for a baseline with a fixed budget
        return estimator.fit(features, target)


def _columns(info: ModalityInfo, splits: dict[str, list[Sample]]) -> dict[str, Any]:
    """split -> the rows of one modality; sparse for text, dense for the rest."""
    values = {name: [sample.modalities.get(info.name) for sample in part] for name, part in splits.items()}
    features = fit_features(info, values["train"])
    return {name: features(rows) for name, rows in values.items()}


def _join(parts: Sequence[Any]) -> Any:
    from scipy.sparse import hstack, issparse

    return hstack(list(parts)).tocsr() if any(map(issparse, parts)) else np.concatenate(parts, axis=1)


def estimators(task: TaskInfo, *, seed: int) -> dict[str, Any]:
    """The two models that are tried for a kind of target."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    options = {"hidden_layer_sizes": (128,), "alpha": 1.0, "max_iter": 60, "random_state": seed}
    if task.target == "regression":
        return {"ridge": Ridge(alpha=10.0), "network": MLPRegressor(**options)}
    logistic = LogisticRegression(C=0.3, max_iter=300)
    if task.target == "multilabel":
        return {"logistic regression": OneVsRestClassifier(logistic), "network": MLPClassifier(**options)}
    return {"logistic regression": logistic, "network": MLPClassifier(**options)}


def outputs_of(estimator: Any, task: TaskInfo, features: Any) -> np.ndarray:
    """(n, C) outputs of a fitted model, one column a class of the task, also for classes it never saw."""
    if task.target == "regression":
        return np.asarray(estimator.predict(features)).reshape(features.shape[0], -1)
    probability = np.asarray(estimator.predict_proba(features))
    if task.target == "multilabel":
        return probability
    out = np.zeros((features.shape[0], task.outputs))
    out[:, np.asarray(estimator.classes_, dtype=int)] = probability
    return out


def fit_features(info: ModalityInfo, train: Sequence[Value | None]) -> Features:
    """A function from values of one modality to rows of numbers, with statistics from the train split."""
    seen = [value for value in train if value is not None]
    if info.kind == "text":
        return _text_features(cast(list[str], seen))
    to_row = _table_row(info) if info.kind == "tabular" else _array_row
    rows = np.stack([to_row(value) for value in seen])
    mean, deviation = rows.mean(0), rows.std(0) + 1e-6

    def features(values: Sequence[Value | None]) -> np.ndarray:
        out = np.zeros((len(values), rows.shape[1]))
        for number, value in enumerate(values):
            if value is not None:
                out[number] = (to_row(value) - mean) / deviation
        return out

    return features


def _text_features(train: list[str]) -> Features:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(min_df=2, ngram_range=(1, 2), sublinear_tf=True, max_features=20_000)
    vectorizer.fit(train)
    # Rows of tf-idf have length 1; the factor brings them to the scale of standardised columns.
    return lambda values: vectorizer.transform([cast(str, value or "") for value in values]) * 5.0


def _table_row(info: ModalityInfo) -> Callable[[Value], np.ndarray]:
    def row(value: Value) -> np.ndarray:
        table = cast(Table, value)
        codes = [np.eye(size)[int(code)] for size, code in zip(info.cat_sizes, table.cat, strict=True)]
        missing = np.isnan(table.num).astype(float)
        return np.concatenate([np.nan_to_num(table.num), missing, *codes])

    return row


def _array_row(value: Value) -> np.ndarray:
    """Images and clips flat; series longer or shorter than NUM_FRAMES resampled to it, with mean and deviation."""
    array = np.nan_to_num(np.asarray(value, dtype=np.float64))
    if array.ndim != 2:
        return array.reshape(-1)
    length = array.shape[0]
    place = np.linspace(0, length - 1, NUM_FRAMES)
    resampled = np.stack([np.interp(place, np.arange(length), column) for column in array.T])
    spread = np.abs(np.diff(array, axis=0)).mean(0) if length > 1 else np.zeros(array.shape[1])
    return np.concatenate([resampled.ravel(), array.mean(0), array.std(0), spread, [length]])
