"""Two tasks over one kind of samples whose labels are opposite, or the same, behind heads that are equal.

So their gradients are opposite, or the same, wherever both reach.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file

from moemm.checkpoint import read_manifest
from moemm.checkpoint.files import sha256_file
from moemm.config import LoadedConfig, load_config
from moemm.data.writer import LabelData, ModalityData, write_file

NUM_SAMPLES = 240


def opposed_config(
    folder: Path, *, modalities: tuple[str, str] = ("u", "v"), joint: bool = False, inverted: bool = True,
    groups: list[dict[str, Any]] | None = None, **train: Any
) -> LoadedConfig:  # fmt: skip
    """Tasks a and b: over two files of these modalities, or with `joint` two labels of one file of both modalities.

    Nine of ten labels of a are `yes`, those of b the opposite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    values = random.normal(size=(NUM_SAMPLES, 2, 2)).astype(np.float32) + 2.0
    label = (np.arange(NUM_SAMPLES) % 10 > 0).astype(np.int64)
    other = 1 - label if inverted else label
    split = (np.arange(NUM_SAMPLES) % 5 // 3 + np.arange(NUM_SAMPLES) % 5 // 4).astype(np.uint8)

    def series() -> ModalityData:
        return ModalityData(kind="timeseries", values=list(values), ragged=True, rate_hz=1.0)

    def labels(**found: np.ndarray) -> dict[str, LabelData]:
        return {name: LabelData(values=one, class_names=("no", "yes")) for name, one in found.items()}

    if joint:
        both = {name: series() for name in dict.fromkeys(modalities)}
        names = labels(label=label, label_b=other)
        write_file(folder / "both.h5", task="a", labels=names, split=split, modalities=both)
        tasks = [{"name": "a", "file": "both.h5"}, {"name": "b", "file": "both.h5", "label": "label_b"}]
    else:
        for task, name, one in zip("ab", modalities, (label, other), strict=True):
            write_file(folder / f"{task}.h5", task=task, labels=labels(label=one), split=split,
                       modalities={name: series()})  # fmt: skip
        tasks = [{"name": task, "file": f"{task}.h5"} for task in "ab"]
    shared: list[dict[str, Any]] = [{"kind": "shared", "width": 16}]
    config: dict[str, Any] = {
        "name": "opposed",
        "data": {"root": str(folder), "num_workers": 0, "tasks": tasks, "joint_labels": joint},
        "model": {"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": groups or shared}},
        "modalities": {name: {"patch": [1], "normalize": "none"} for name in dict.fromkeys(modalities)},
        "train": {"output": str(folder / "run"), "steps": 4, "batch_size": 16, "baselines": False, **train},
    }
    path = folder / "opposed.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return load_config(path)


def equal_halves(weights: dict[str, torch.Tensor]) -> None:
    """In place: what task b and modality v have of their own becomes that of a and u."""
    random = torch.Generator().manual_seed(1)
    for name, value in weights.items():
        if name.startswith("heads.linear.a."):
            value.copy_(0.05 * torch.randn(value.shape, generator=random) if name.endswith("weight") else 0 * value)
    weights["heads.pool.query.b"].copy_(weights["heads.pool.query.a"])
    for name in weights:
        for own, model in (("heads.linear.b.", "heads.linear.a."), ("tokenizers.v.", "tokenizers.u."),
                           ("modality_D.v", "modality_D.u")):  # fmt: skip
            if name.startswith(own):
                weights[name].copy_(weights[name.replace(own, model)])


def plant(run: Path) -> None:
    """Make the halves equal in every checkpoint of a run, whose manifests then fit again."""
    for folder in sorted((run / "checkpoints").glob("step_*")):
        path = folder / "model.safetensors"
        weights = load_file(path)
        equal_halves(weights)
        save_file(weights, path)
        manifest = read_manifest(folder)
        entry = {"size": path.stat().st_size, "sha256": sha256_file(path)}
        replace(manifest, files={**manifest.files, path.name: entry}).write(folder)
