"""A run that is small enough for tests: two files of made-up signals, three modalities, a few thousand parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moemm.config import LoadedConfig, load_config
from moemm.data.value import Table
from moemm.data.writer import LabelData, ModalityData, write_file

NUM_SAMPLES = 96
NUM_CLASSES = 3


def write_tiny_data(folder: Path, *, seed: int = 0) -> None:
    """`shapes.h5` (image, record; every third sample lacks its record; `group` has pairs of neighbours) and `tones.h5`
    (series of several lengths).
    """  # fmt: skip
    random = np.random.default_rng(seed)
    split = np.arange(NUM_SAMPLES) % 4
    split = np.where(split < 2, 0, split - 1).astype(np.uint8)  # half train, a quarter each val and test
    label = random.integers(0, NUM_CLASSES, NUM_SAMPLES)
    labels = {"label": LabelData(values=label, class_names=("a", "b", "c"))}
    images = random.normal(size=(NUM_SAMPLES, 1, 8, 8)).astype(np.float32) + label[:, None, None, None]
    num = (random.normal(size=(NUM_SAMPLES, 2)) + label[:, None]).astype(np.float32)
    num[::3] = np.nan
    table = Table(num=num, cat=np.zeros((NUM_SAMPLES, 0), np.int32))
    shapes = {
        "image": ModalityData(kind="image", values=images, layout="CHW"),
        "record": ModalityData(kind="tabular", values=table, num_names=("u", "v")),
    }
    group = np.arange(NUM_SAMPLES) // 2
    write_file(folder / "shapes.h5", task="shapes", labels=labels, split=split, group=group, modalities=shapes)
    series = [
        (random.normal(size=(int(random.integers(6, 16)), 4)) + value).astype(np.float32) for value in label.tolist()
    ]
    tones = {"series": ModalityData(kind="timeseries", values=series, ragged=True, rate_hz=100.0)}
    write_file(folder / "tones.h5", task="tones", labels=labels, split=split, modalities=tones)


def tiny_config(folder: Path, **sections: dict[str, Any]) -> LoadedConfig:
    """A configuration of the tiny data in `folder` (written there if it is not yet); `sections` override keys of it."""
    if not (folder / "tones.h5").exists():
        write_tiny_data(folder)
    values: dict[str, dict[str, Any]] = {
        "data": {
            "root": str(folder),
            "num_workers": 0,
            "tasks": [{"name": "shapes", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5"}],
        },
        "model": {
            "dim": 16,
            "heads": 2,
            "layers": 2,
            "experts": {
                "groups": [
                    {"kind": "shared", "width": 16},
                    {"kind": "modality", "width": 8},
                    {"kind": "routed", "count": 2, "width": 8},
                ]
            },
        },
        "train": {"output": str(folder / "run"), "steps": 6, "batch_size": 8, "log_every": 1, "warmup": 0.2},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", **values}), encoding="utf-8")
    return load_config(path)
