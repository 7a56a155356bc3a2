"""The scikit-learn baseline: it must be a strong opponent, use every modality, and never look at test."""

from __future__ import annotations

import numpy as np
import pytest

from moemm.data.catalogue import ModalityInfo, TaskInfo
from moemm.data.sample import Sample, Table
from moemm.evaluate import baseline

INFOS = [
    ModalityInfo(name="series", kind="timeseries", ragged=True, shape=(2,)),
    ModalityInfo(name="record", kind="tabular", ragged=False, num_names=("a",), cat_names=("c",), cat_sizes=(3,)),
    ModalityInfo(name="text", kind="text", ragged=True),
]


def samples(count: int, seed: int, *, target: str = "classification") -> list[Sample]:
    """Class = parity of two independent bits, one in the series, one in the text; the record is noise with holes."""
    generator = np.random.default_rng(seed)
    found = []
    for index in range(count):
        label = int(generator.integers(2))
        length = int(generator.integers(3, 9))
        series = generator.standard_normal((length, 2)).astype(np.float32) + 1.5 * label
        number = np.float32(np.nan if index % 3 == 0 else generator.standard_normal())
        table = Table(np.array([number], np.float32), generator.integers(0, 3, 1).astype(np.int32))
        values = {"series": series, "record": table, "text": "good film" if label else "bad film"}
        if index % 5 == 0:
            del values["text"]
        found.append(Sample("t", index, values, float(label) if target == "regression" else label))
    return found


def task(target: str = "classification", metric: str = "accuracy", modalities: tuple[str, ...] = ()) -> TaskInfo:
    outputs = 1 if target == "regression" else 2
    names = modalities or tuple(info.name for info in INFOS)
    return TaskInfo(
        name="t", file="t.h5", label="label", target=target, outputs=outputs, metric=metric, modalities=names, sizes={}
    )


def splits(**options: str) -> dict[str, list[Sample]]:
    return {name: samples(120, seed, **options) for seed, name in enumerate(("train", "val", "test"))}


def test_it_learns_from_every_kind_and_takes_absent_modalities() -> None:
    found = baseline(task(), INFOS, splits())
    assert found["test"] > 0.95 and found["val"] > 0.95
    assert "regression" in found["model"] or "network" in found["model"]


def test_it_uses_no_other_modality_than_the_tasks() -> None:
    found = baseline(task(modalities=("record",)), INFOS, splits())
    assert found["test"] < 0.65, "the record is noise"


def test_it_chooses_on_val_and_ignores_test() -> None:
    parts = splits()
    flipped = [Sample(s.task, s.index, s.modalities, 1 - int(s.target)) for s in parts["test"]]
    straight, other = baseline(task(), INFOS, parts), baseline(task(), INFOS, {**parts, "test": flipped})
    assert straight["model"] == other["model"] and straight["val"] == other["val"]
    assert other["test"] == pytest.approx(1 - straight["test"])


def test_regression_takes_the_smaller_error() -> None:
    found = baseline(task("regression", "rmse"), INFOS, splits(target="regression"))
    assert found["test"] < 0.35


def test_it_is_deterministic() -> None:
    assert baseline(task(), INFOS, splits()) == baseline(task(), INFOS, splits())
