"""Four modalities of one shape in two families: in one the product of two channels is the label, in one their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moemm.config import LoadedConfig, load_config
from moemm.data.writer import LabelData, ModalityData, write_file

NAMES = ("product_1", "sum_1", "product_2", "sum_2")
FAMILIES = [("product_1", "product_2"), ("sum_1", "sum_2")]
NUM_SAMPLES = 640


def planted_config(folder: Path, **sections: dict[str, Any]) -> LoadedConfig:
    """Writes the files and a configuration with an expert a modality."""
    random = np.random.default_rng(0)
    for name in NAMES:
        values = random.normal(size=(NUM_SAMPLES, 1, 2)).astype(np.float32)
        score = values.prod(2) if name.startswith("product") else values.sum(2)
        labels = {"label": LabelData(values=(score[:, 0] > 0).astype(np.int64), class_names=("no", "yes"))}
        split = (np.arange(NUM_SAMPLES) % 5 // 3 + np.arange(NUM_SAMPLES) % 5 // 4).astype(np.uint8)
        series = {name: ModalityData(kind="timeseries", values=list(values), ragged=True, rate_hz=1.0)}
        write_file(folder / f"{name}.h5", task=name, labels=labels, split=split, modalities=series)
    groups = [{"kind": "shared", "width": 8}, {"kind": "modality", "width": 16}]
    values_of: dict[str, Any] = {
        "name": "planted",
        "data": {"root": str(folder), "num_workers": 0, "tasks": [{"name": n, "file": f"{n}.h5"} for n in NAMES]},
        "model": {"dim": 16, "heads": 2, "layers": 1, "experts": {"groups": groups}},
        "modalities": {name: {"patch": [1], "normalize": "none"} for name in NAMES},
        "train": {"output": str(folder / "run"), "steps": 4, "batch_size": 8, "lr": 1e-2, "baselines": False},
    }
    for name, section in sections.items():
        values_of[name] = {**values_of[name], **section}
    path = folder / "planted.yaml"
    path.write_text(yaml.safe_dump(values_of), encoding="utf-8")
    return load_config(path)
