"""What a rank of `benchmarks.planner` does: train three steps of a made-up run, then say what it took.

The peak is the kernel's VmHWM over the whole life of the process. glibc gives freed buffers back at once
(benchmarks.memory.ENVIRONMENT), so that what is resident is what is allocated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.memory import resident
from moemm.config import load_config
from moemm.data.loader import train_loader
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.distributed import connect
from moemm.testing.traffic import count_traffic
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer

STEPS = 3
SAMPLES, CLASSES = 96, 3
"""Of the made-up data: a picture of 64 patches and a series of 64 frames in each sample."""


def write_data(folder: Path) -> None:
    """`signals.h5` in `folder`: images (3, 32, 32) and series (64, 4), all there."""
    random = np.random.default_rng(0)
    split = (np.arange(SAMPLES) % 3).astype(np.uint8)
    label = random.integers(0, CLASSES, SAMPLES)
    image = random.normal(size=(SAMPLES, 3, 32, 32)).astype(np.float32)
    series = random.normal(size=(SAMPLES, 64, 4)).astype(np.float32)
    modalities = {
        "image": ModalityData(kind="image", values=image, layout="CHW"),
        "series": ModalityData(kind="timeseries", values=series),
    }
    labels = {"label": LabelData(values=label, class_names=("a", "b", "c"))}
    write_file(folder / "signals.h5", task="signals", labels=labels, split=split, modalities=modalities)


def write_run(folder: Path, values: dict[str, Any]) -> Path:
    """The configuration of a case, beside the data; `values`: its sections."""
    run: dict[str, Any] = {
        "name": "planner",
        "data": {"num_workers": 0, "tasks": [{"name": "signals", "file": "signals.h5"}]},
        "modalities": {"image": {"patch": [4, 4]}, "series": {"patch": [1]}},
        **{key: value for key, value in values.items() if key != "train"},
        "train": {"steps": STEPS, "log_every": 1000, "baselines": False, **values.get("train", {})},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def measure(path: str, output: str) -> dict[str, Any]:
    """Bytes of this process at its peak, at the end of each step, and what the last step sent."""
    torch.set_num_threads(1)
    loaded = load_config(Path(path), ["--train.output", output])
    world = connect(timeout_s=300)
    setup, _ = prepare(loaded, resume=False)
    trainer = Trainer(setup, world, [], StopRequest())
    marks = {"ready": resident("VmRSS"), "ready_peak": resident("VmHWM")}
    batches = _batches(trainer)
    trainer.engine.model.train()
    for step in range(STEPS):
        with count_traffic() as traffic:
            trainer._one_step(batches)
        marks[f"step{step}"] = resident("VmHWM")
    total, active = trainer.num_parameters
    return {"peak": resident("VmHWM"), "total": total, "active": active, "marks": marks, "traffic": traffic.bytes}


def _batches(trainer: Trainer) -> Any:
    loader = train_loader(
        trainer.setup.catalogue, trainer.config, rank=trainer.world.rank, world_size=trainer.world.size,
        start_step=0, total_steps=STEPS, prepare=trainer._prepare,
    )  # fmt: skip
    return iter(loader)
