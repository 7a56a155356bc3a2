from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moemm.config.schema import DataConfig, TaskConfig
from moemm.data import Catalogue, LabelData, PackedBatch, Packer, Sample, SplitDataset, Table, build_catalogue
from moemm.data.flat import flatten, unflatten
from moemm.errors import DataError


@pytest.fixture
def catalogue(make_file: Any, tmp_path: Path) -> Catalogue:
    """Three tasks (classes, two labels at once, a number) over one file with every form of modality."""
    labels = {
        "label": LabelData(values=np.arange(24) % 3),
        "label_tags": LabelData(values=np.ones((24, 2), np.uint8)),
        "label_size": LabelData(values=np.arange(24.0)),
    }
    make_file(labels=labels, class_names=[])
    tasks = [TaskConfig(name=f"t_{name}", file="good.h5", label=name) for name in labels]
    return build_catalogue(DataConfig(tasks=tasks), base=tmp_path)


def tensors(batch: PackedBatch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11)), max_size=12))
def test_a_batch_holds_its_samples_and_nothing_else(catalogue: Catalogue, picks: list[tuple[int, int]]) -> None:
    sets = [SplitDataset(catalogue, task=task.name, split="train") for task in catalogue.tasks]
    samples = [sets[task][item] for task, item in picks]
    batch = Packer(catalogue)(samples)
    assert batch.num_samples == len(samples)
    assert list(batch.modalities) == [info.name for info in catalogue.modalities]
    assert batch.index.tolist() == [sample.index for sample in samples]
    assert batch.task.tolist() == [task for task, _ in picks]
    for column, (name, packed) in enumerate(batch.modalities.items()):
        have = [row for row, sample in enumerate(samples) if name in sample.modalities]
        assert packed.sample.tolist() == have == batch.presence[:, column].nonzero().flatten().tolist()
        for row, value in zip(have, unpacked(packed), strict=True):
            assert_equal(value, samples[row].modalities[name])
    for position, task in enumerate(catalogue.tasks):
        expected = [samples[row].target for row in range(len(samples)) if picks[row][0] == position]
        assert np.array_equal(batch.targets[task.name], np.array(expected).reshape(batch.targets[task.name].shape))


def unpacked(packed: Any) -> list[Any]:
    if "num" in packed.fields:
        return list(zip(packed.fields["num"], packed.fields["cat"], strict=True))
    data = packed.fields["data"]
    return list(data if packed.lengths is None else data.split(packed.lengths.tolist()))


def assert_equal(value: Any, expected: Any) -> None:
    if isinstance(expected, str):
        assert bytes(value.tolist()).decode() == expected
    elif isinstance(expected, Table):
        assert all(np.array_equal(v, e, equal_nan=True) for v, e in zip(value, expected, strict=True))
    else:
        assert np.array_equal(value, expected, equal_nan=True)


def test_an_empty_batch_has_every_type_and_width(catalogue: Catalogue) -> None:
    full = Packer(catalogue)([SplitDataset(catalogue, task=t.name, split="train")[0] for t in catalogue.tasks])
    empty = Packer(catalogue)([])
    assert empty.num_samples == 0 and empty.presence.shape == (0, 5)
    for one, other in zip(tensors(full), tensors(empty), strict=True):
        assert one.dtype == other.dtype and one.shape[1:] == other.shape[1:] and other.shape[0] == 0
    assert {name: t.dtype for name, t in empty.targets.items()} == {
        "t_label": torch.int64,
        "t_label_tags": torch.float32,
        "t_label_size": torch.float32,
    }


def test_prepare_runs_on_each_value(catalogue: Catalogue) -> None:
    sample = SplitDataset(catalogue, task="t_label", split="train")[0]
    batch = Packer(catalogue, {"text": lambda text: np.array([len(text)], np.int32)})([sample])
    data = batch.modalities["text"].fields["data"]
    assert data.dtype == torch.int64 and data.tolist() == [len(sample.modalities["text"])]


def test_what_prepare_leaves_empty_is_absent(catalogue: Catalogue) -> None:
    sample = SplitDataset(catalogue, task="t_label", split="train")[0]
    packer = Packer(catalogue, {"text": lambda _: np.zeros(0, np.int64)})
    batch = packer([sample])
    assert batch.presence[0].tolist() == [True, True, True, True, False]
    only_text = Sample(sample.task, 7, {"text": sample.modalities["text"]}, 0)
    with pytest.raises(DataError, match=r"(?s)task t_label: 1 sample.*good\.h5.*index 7.*to do"):
        packer([sample, only_text])


def test_a_sample_without_modalities_is_named(catalogue: Catalogue) -> None:
    with pytest.raises(DataError, match=r"task t_label_size: 2 sample.*index 3, 4"):
        Packer(catalogue)([Sample("t_label_size", i, {}, 0.0) for i in (3, 4)])


@pytest.mark.parametrize("value", [np.zeros((6, 3), np.float32), np.zeros((6, 2)), np.zeros((6, 2), np.uint8)])
def test_a_value_of_another_shape_or_type_is_named(catalogue: Catalogue, value: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"(?s)modality accel .*t_label 5\n.*\(6, 2\), float32"):
        Packer(catalogue)([Sample("t_label", 5, {"accel": value}, 0)])


def test_flat_batches_come_back(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = SplitDataset(catalogue, task="t_label_tags", split="train")
    for samples, limit in (([], 1 << 20), ([dataset[i] for i in range(12)], 1 << 20), ([dataset[5]], 0)):
        monkeypatch.setattr("moemm.data.flat._THROUGH_PIPE", limit)
        batch = Packer(catalogue)(samples)
        flat = flatten(batch)
        assert isinstance(flat.buffer, np.ndarray if limit else torch.Tensor)
        again = unflatten(pickle.loads(pickle.dumps(flat)))
        for one, other in zip(tensors(batch), tensors(again), strict=True):
            assert one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        assert list(again.targets) == list(batch.targets)


def test_datasets_survive_pickling(catalogue: Catalogue) -> None:
    dataset = SplitDataset(catalogue, task="t_label", split="val")
    dataset[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3].index == dataset[3].index
