"""How long a checkpoint stops training: written at once, and in the background.

    python -m benchmarks.checkpoint               # some minutes on 2 cores

The quickstart's data and modalities with a model of 20 million parameters; one rank with ZeRO 0, two with ZeRO 2, each
rank with one thread. A save in the background stops training for the copy and for the agreements of the ranks; steps
while its files are written are slower where writing and hashing share the cores with training.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from benchmarks.record import Row
from moemm.config import load_config
from moemm.distributed import connect
from moemm.testing.distributed import run_distributed
from moemm.train.callbacks import Callback
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "quickstart.yaml"
MODEL = {
    "dim": 256, "heads": 4, "layers": 4, "moe": "sparse", "dropout": 0.2,
    "experts": {"groups": [
        {"kind": "shared", "width": 1024}, {"kind": "modality", "width": 512},
        {"kind": "routed", "count": 4, "width": 512},
    ]},
}  # fmt: skip
WARM, PLAIN, SYNC, BEHIND = 2, 6, 3, 5
"""Steps before anything is measured, steps without a save, saves that stop, saves in the background."""
NOTED = ("plain", "sync", "stop", "whole", "beside")
"""Seconds of steps without a save; of saves that stop; of stops by saves in the background; until those are complete;
of steps beside them."""
TARGET = 0.10
CASES = {"1 rank, ZeRO 0": (1, 0), "2 ranks, ZeRO 2": (2, 2)}


class Done(Exception):
    """All saves are measured."""


class Clock(Callback):
    """Saves after certain steps, and notes what steps and saves took."""

    every_rank = True

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {name: [] for name in NOTED}
        self.under_way, self.since = False, 0.0
        self.last = time.perf_counter()

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        began = time.perf_counter()
        step = trainer.step - WARM
        if step > 0:
            self.found["beside" if self.under_way else "plain"].append(began - self.last)
        if PLAIN <= step < PLAIN + SYNC:
            trainer.save()
            self.found["sync"].append(time.perf_counter() - began)
        elif step >= PLAIN + SYNC:
            self.behind(trainer, began)
        self.last = time.perf_counter()

    def behind(self, trainer: Trainer, began: float) -> None:
        if self.under_way:
            complete = trainer.continue_save(wait=False)
            self.found["stop"][-1] += time.perf_counter() - began
            if complete:
                self.under_way = False
                self.found["whole"].append(time.perf_counter() - self.since)
            return
        if len(self.found["stop"]) == BEHIND:
            raise Done
        self.under_way, self.since = True, began
        trainer.save(background=True)
        self.found["stop"].append(time.perf_counter() - began)


def measure(folder: str, stage: int) -> dict[str, Any]:
    """Runs in a rank: seconds of steps and saves, and bytes of a checkpoint."""
    values = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    values["data"]["root"] = str(RECIPE.parent / values["data"]["root"])
    values["model"], values["deepspeed"] = MODEL, {"zero_stage": stage}
    values["train"] |= {"output": f"{folder}/run", "epochs": None, "steps": 400, "log_every": 1000}
    world = connect(timeout_s=300)
    path = Path(folder) / f"config_{world.rank}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    clock = Clock()
    setup, _ = prepare(load_config(path), resume=False)
    trainer = Trainer(setup, world, [clock], StopRequest())
    with contextlib.suppress(Done):
        trainer.run()
    newest = max(setup.checkpoints.glob("step_??????"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    return {**clock.found, "size": size, "parameters": trainer.num_parameters[0]}


def rows_of(case: str, ranks: list[dict[str, Any]]) -> list[Row]:
    """The figures of a case: a step or a stop takes as long as on the slowest rank."""
    slowest = {name: [max(values) for values in zip(*(rank[name] for rank in ranks), strict=True)] for name in NOTED}
    step, first = statistics.median(slowest["plain"]), slowest["stop"][0]
    sync, stop = statistics.median(slowest["sync"]), statistics.median(slowest["stop"][1:])
    size = ranks[0]["size"]
    return [
        Row(case=case, metric="parameters", value=ranks[0]["parameters"] / 1e6, unit="M"),
        Row(case=case, metric="size of a checkpoint", value=size / 1e6, unit="MB", better="lower"),
        Row(case=case, metric="time of a step", value=step * 1000, unit="ms", better="lower"),
        Row(case=case, metric="stop, written at once", value=sync * 1000, unit="ms", better="lower"),
        Row(case=case, metric="stop, in the background", value=stop * 1000, unit="ms", better="lower"),
        Row(case=case, metric="stop / step, written at once", value=sync / step, better="lower"),
        Row(case=case, metric="stop / step, in the background", value=stop / step, better="lower", target=TARGET),
        Row(case=case, metric="stop / step, the first in the background", value=first / step, better="lower"),
        Row(
            case=case, metric="until a background save is complete", value=statistics.median(slowest["whole"]),
            unit="s", better="lower",
        ),
        Row(
            case=case, metric="step beside a background save / step",
            value=statistics.mean(slowest["beside"]) / step, better="lower",
        ),
    ]  # fmt: skip


def main() -> None:
    """Measure, write results/checkpoint.json, and print the table."""
    began, rows = time.perf_counter(), []
    for case, (ranks, stage) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            results = run_distributed(
                "benchmarks.checkpoint:measure", ranks=ranks, arguments={"folder": folder, "stage": stage},
                environ={"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}, timeout_s=3600,
            )  # fmt: skip
        rows += rows_of(case, [result.value for result in results])
    path = record.write("checkpoint", rows, seeds=[0], seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
