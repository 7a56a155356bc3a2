from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from data_files import every_form

from moemm.config.schema import DataConfig, TaskConfig
from moemm.data import LabelData, ModalityData, SplitDataset, Table, build_catalogue
from moemm.errors import ConfigError, DataError, MoemmError


def build(folder: Path, *tasks: dict[str, Any]) -> Any:
    entries = [TaskConfig(**{"file": "good.h5", "name": f"task{i}", **task}) for i, task in enumerate(tasks)]
    return build_catalogue(DataConfig(tasks=entries, root=folder.name), base=folder.parent)


def series(width: int, *, kind: str = "timeseries", dtype: type = np.float32, **options: Any) -> ModalityData:
    return ModalityData(kind=kind, values=[np.ones((1 + i % 2, width), dtype) for i in range(24)], **options)


def test_tasks_and_modalities_in_order(make_file: Any, tmp_path: Path) -> None:
    make_file()
    make_file("other.h5", modalities={"record": every_form()["record"], "ecg": series(2)})
    catalogue = build(
        tmp_path,
        {"name": "b", "modalities": ["text", "signal"], "rename": {"accel": "signal"}, "weight": 2.0},
        {"name": "a", "file": "other.h5"},
    )
    first, second = catalogue.tasks
    assert (first.name, first.modalities, first.stored, first.weight) == ("b", ("signal", "text"), ("accel", "text"), 2)
    assert (second.name, second.modalities, second.outputs, second.metric) == ("a", ("ecg", "record"), 3, "accuracy")
    assert first.sizes == {"train": 12, "val": 6, "test": 6, "ood": 0}
    assert [info.name for info in catalogue.modalities] == ["signal", "text", "ecg", "record"]
    sample = SplitDataset(catalogue, task="b", split="val")[0]
    assert (sample.task, sample.index, set(sample.modalities), sample.target) == ("b", 12, {"signal", "text"}, 0)


def test_two_labels_of_one_file(make_file: Any, tmp_path: Path) -> None:
    labels = {"label": LabelData(values=np.zeros(24, int)), "label_size": LabelData(values=np.ones((24, 1)))}
    make_file(labels=labels)
    catalogue = build(tmp_path, {}, {"label": "label_size"})
    assert [task.target for task in catalogue.tasks] == ["classification", "regression"]
    dataset = SplitDataset(catalogue, task="task1", split="train")
    assert dataset.targets.shape == (12,) and dataset[0].target == 1.0


DISAGREE = {
    "kind": series(3, kind="sensor"),
    "shape": series(4),
    "ragged": ModalityData(kind="timeseries", values=np.ones((24, 2, 3), np.float32)),
    "dtype": series(3, dtype=np.int16),
    "rate_hz": series(3, rate_hz=20.0),
    "unit": series(3, unit="g"),
}


@pytest.mark.parametrize("key", DISAGREE)
def test_files_that_disagree_name_both_and_the_way_out(make_file: Any, tmp_path: Path, key: str) -> None:
    make_file(modalities={"ecg": series(3, rate_hz=10.0, unit="mV")})
    make_file("other.h5", modalities={"ecg": DISAGREE[key]})
    with pytest.raises(DataError) as error:
        build(tmp_path, {}, {"file": "other.h5"})
    message = str(error.value)
    assert "good.h5" in message and "other.h5" in message and key in message
    line = re.search(r"^\s*(rename: .*)$", message, re.MULTILINE)
    assert line is not None
    catalogue = build(tmp_path, {}, {"file": "other.h5", **yaml.safe_load(line[1])})
    assert [info.name for info in catalogue.modalities] == ["ecg", "task1_ecg"]


def test_tables_of_one_name_need_the_same_columns(make_file: Any, tmp_path: Path) -> None:
    table = ModalityData(kind="tabular", values=Table(np.ones((24, 1)), np.zeros((24, 0), int)), num_names=["age"])
    make_file(modalities={"t": table})
    other = ModalityData(kind="tabular", values=table.values, num_names=["height"])
    make_file("other.h5", modalities={"t": other})
    with pytest.raises(DataError, match=r"num_names \('age',\) against \('height',\)"):
        build(tmp_path, {}, {"file": "other.h5"})


def test_what_only_one_file_knows_is_kept(make_file: Any, tmp_path: Path) -> None:
    make_file(modalities={"ecg": series(3)})
    make_file("other.h5", modalities={"ecg": series(3, rate_hz=10.0)})
    assert build(tmp_path, {}, {"file": "other.h5"}).modalities[0].rate_hz == 10.0


WRONG_CONFIG = {
    "two tasks of one name": ([{"name": "a"}, {"name": "a"}], "2 tasks are named 'a'"),
    "unknown rename": ([{"rename": {"txt": "words"}}], "did you mean text"),
    "bad new name": ([{"rename": {"text": "my text"}}], "is no name"),
    "unknown modality": ([{"modalities": ["imag"]}], "did you mean image"),
    "two of one name": ([{"rename": {"text": "image"}}], "would both be named 'image'"),
}


@pytest.mark.parametrize("case", WRONG_CONFIG)
def test_names_that_the_files_lack(make_file: Any, tmp_path: Path, case: str) -> None:
    make_file()
    tasks, message = WRONG_CONFIG[case]
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, *tasks)


def split_of(**sizes: int) -> np.ndarray:
    numbers = {"train": 0, "val": 1, "test": 2}
    return np.concatenate([np.full(count, numbers[name]) for name, count in sizes.items()])


LABEL = np.arange(24) % 3
WRONG_DATA: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing file": ({}, {"file": "nowhere.h5"}, r"nowhere\.h5.*No such file"),
    "label missing": ({}, {"label": "label_mood"}, r"no label 'label_mood'"),
    "no training sample": ({"split": split_of(val=12, test=12)}, {}, "no sample of split train .*train 0, val 12"),
    "no val sample": ({"split": split_of(train=12, test=12)}, {}, "no sample of split val"),
    "class only in test": ({"labels": np.where(np.arange(24) > 21, 2, LABEL % 2)}, {}, r"of z \(2 in test\)"),
    "class only in val": ({"labels": np.where(np.arange(24) == 13, 2, LABEL % 2)}, {}, r"of z \(1 in val\)"),
    "label column only in test": (
        {"labels": (np.arange(24)[:, None] >= [0, 20]).astype(np.uint8), "class_names": []},
        {},
        r"class 1 \(4 in test\)",
    ),
    "nothing of a sample": ({}, {"modalities": ["text"]}, r"task0: 1 sample.*index 3"),
    "nothing of two samples": (
        {"modalities": {"x": ModalityData(kind="text", values=["a", "", ""] + ["a"] * 21)}},
        {},
        "index 1, 2",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_data_that_cannot_be_learned_from(make_file: Any, tmp_path: Path, case: str) -> None:
    changes, task, message = WRONG_DATA[case]
    make_file(**changes)
    with pytest.raises(DataError, match=message) as error:
        build(tmp_path, task)
    assert "to do:" in str(error.value)


def test_a_modality_that_no_training_sample_has(make_file: Any, tmp_path: Path) -> None:
    late = ModalityData(kind="text", values=[""] * 12 + ["a"] * 12)
    make_file(modalities={**every_form(), "late": late})
    with pytest.raises(DataError, match="no sample of split train has modality late"):
        build(tmp_path, {})


def test_classes_of_split_3_may_be_new(make_file: Any, tmp_path: Path) -> None:
    split = split_of(train=18, val=5, test=1)
    split[23] = 3
    make_file(split=split, labels=np.where(np.arange(24) == 23, 2, LABEL % 2))
    assert build(tmp_path, {}).tasks[0].sizes["ood"] == 1


def test_a_file_that_changed_since_is_noticed(make_file: Any, tmp_path: Path) -> None:
    make_file()
    catalogue = build(tmp_path, {})
    make_file(split=split_of(train=20, val=3, test=1))
    with pytest.raises(DataError, match="has 20 samples, and had 12"):
        SplitDataset(catalogue, task="task0", split="train")[0]


@pytest.mark.parametrize("arguments", [{"task": "x", "split": "train"}, {"task": "task0", "split": "dev"}])
def test_unknown_task_or_split(make_file: Any, tmp_path: Path, arguments: dict[str, str]) -> None:
    make_file()
    with pytest.raises(MoemmError, match=r"'x'.*task0|'dev'.*train, val"):
        SplitDataset(build(tmp_path, {}), **arguments)
