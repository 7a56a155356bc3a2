"""Row 18: 2,000 steps of two ranks with faults mixed in: memory grows by less than 2 %, open files stay as many."""

from __future__ import annotations

import errno
import gc
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.outcome import Outcome
from benchmarks.faults.values import poison, write_vectors
from moemm.data.sample import PackedBatch
from moemm.distributed import connect, gather_objects
from moemm.points import Place, listen, unlisten
from moemm.testing.forked import Nursery
from moemm.testing.tiny import tiny_config
from moemm.train import train
from moemm.train import trainer as trainer_module
from moemm.train.callbacks import Callback
from moemm.train.trainer import Trainer

LONG = "2,000 steps with faults mixed in"
POISONED, FULL, FIRST = 97, 7, 0.2
"""An infinite value every so many steps; one of so many saves fails; from this share of the steps on memory counts."""


def resident() -> float:
    """MiB of this process that are in memory. Not its own alone: a fork makes pages its own bit by bit."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def open_files(looks: int = 3, apart_s: float = 0.02) -> list[str]:
    """What this process has open, with N in place of numbers: the fewest of some looks.

    TensorBoard's thread opens its file for each write, and closes it again.
    """
    found = []
    for _ in range(looks):
        found.append(_open_now())
        time.sleep(apart_s)
    return min(found, key=len)


def _open_now() -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found.append(re.sub(r"\d+", "N", os.readlink(f"/proc/self/fd/{name}")))
    return sorted(found)


class Watch(Callback):
    """Memory and open files every so many steps, on all ranks."""

    every_rank = True

    def __init__(self, every: int) -> None:
        self._every = every
        self.memory: list[float] = []
        self.files: list[list[str]] = []

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        """Look."""
        if trainer.step % self._every == 0:
            self.memory.append(resident())
            self.files.append(open_files())


class Faults:
    """Steps whose data is broken, and saves that fail."""

    def __init__(self, rank: int) -> None:
        self._rank, self._saves = rank, 0

    def __call__(self, place: Place) -> None:
        """Listens to the points."""
        if place.name == "save.file" and self._rank == 1:
            self._saves += 1
            if self._saves % FULL == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def loader(self, real: Any) -> Any:
        """A loader in place of `real`."""
        rank = self._rank

        class Poisoned:
            def __init__(self, *given: Any, **named: Any) -> None:
                self._loader = real(*given, **named)
                self.bad = self._loader.bad

            def __iter__(self) -> Iterator[PackedBatch]:
                for step, batch in enumerate(self._loader):
                    name = list(batch.modalities)[step % len(batch.modalities)]
                    wanted = step % POISONED == POISONED - 1 and rank == step % 2
                    yield poison(batch, name, float("inf")) if wanted else batch

            def close(self) -> None:
                self._loader.close()

        return Poisoned


def job(folder: str, steps: int) -> dict[str, Any]:
    """Train that long; what memory and files were, and what was told."""
    world = connect(timeout_s=60)
    mine = Path(folder) / f"rank_{world.rank}"
    mine.mkdir(exist_ok=True)
    if not (mine / "vectors.h5").exists():
        write_vectors(mine)
    files = ("shapes", "tones", "vectors")
    loaded = tiny_config(
        mine,
        data={"root": str(mine), "num_workers": 1, "tasks": [{"name": one, "file": f"{one}.h5"} for one in files]},
        train={
            "output": str(Path(folder) / "run"), "steps": steps, "batch_size": 16, "log_every": 10, "baselines": False,
            "checkpoint": {"every": 50}, "eval_every": max(1, steps // 8),
        },
        deepspeed={"zero_stage": 2},
    )  # fmt: skip
    watch, faults = Watch(max(1, steps // 50)), Faults(world.rank)
    real = trainer_module.train_loader
    trainer_module.train_loader = faults.loader(real)
    listen(faults)
    try:
        summary = train(loaded, extra_callbacks=[watch])
    finally:
        unlisten(faults)
        trainer_module.train_loader = real
    told = [len(watch.memory), summary["exit_code"]]
    return {"memory": gather_objects(watch.memory), "files": gather_objects(watch.files), "told": told}


def growth(values: list[float]) -> float:
    """Share by which the last fifth is above the fifth that begins at FIRST (medians)."""
    first = int(FIRST * len(values))
    fifth = max(1, len(values) // 5)
    return float(np.median(values[-fifth:]) / np.median(values[first : first + fifth]) - 1.0)


def run(nursery: Nursery, folder: Path, steps: int) -> tuple[Outcome, float]:
    """The row, and the largest growth of a rank."""
    (result, _) = nursery.run(
        "benchmarks.faults.long:job", arguments={"folder": str(folder), "steps": steps}, timeout_s=120 + steps,
        check=True,
    )  # fmt: skip
    grown = [growth(one) for one in result.value["memory"]]
    wrong = [f"memory of rank {rank} grew by {one:.1%}" for rank, one in enumerate(grown) if one >= 0.02]
    for rank, files in enumerate(result.value["files"]):
        first = int(FIRST * len(files))
        fewest, most = min(files[first:], key=len), max(files[first:], key=len)
        if len(most) != len(fewest):
            more = ", ".join((Counter(most) - Counter(fewest)).elements())
            wrong.append(f"open files of rank {rank} went from {len(fewest)} to {len(most)}: {more}")
    lines = (folder / "run" / "metrics.jsonl").read_text()
    if steps >= 2 * POISONED and (lines.count('"left_out"') < 1 or lines.count("was not written") < 1):
        wrong.append("the faults did not happen")
    return Outcome(LONG, 1, wrong), max(grown)
