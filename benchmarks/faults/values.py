"""Row 8: NaN or Inf in input, loss or gradient of each modality, ZeRO 0-3, fp32 and bf16, on one rank of two.

What must happen: the step is done as if that modality had been absent from it. So every case is compared with a run in
which it was absent; weights may differ by 1e-6.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.faults.outcome import Outcome, spread
from moemm.checkpoint.store import full_weights
from moemm.data.leave_out import leave_out
from moemm.data.sample import PackedBatch
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.distributed import World, broadcast_object, connect
from moemm.errors import HealthError
from moemm.testing.forked import Nursery
from moemm.testing.tiny import tiny_config
from moemm.train import trainer as trainer_module
from moemm.train.callbacks import Callback, CheckpointingCallback, JsonLinesCallback
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer

MODALITIES = ("image", "record", "series", "vector")
PLACES = ("input", "loss", "gradient")
ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
"""bf16 needs ZeRO >= 1."""
BROKEN_VALUES = "NaN or Inf in input, loss or gradient of a modality"
CASES = list(itertools.product(ENGINES, PLACES, ("nan", "inf"), MODALITIES))
BROKEN, STEPS, NEAR = 2, 4, 1e-6
SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000}}


def write_vectors(folder: Path) -> None:
    """A third task with a modality of its own, so that there are four."""
    random = np.random.default_rng(1)
    label = random.integers(0, 3, 96)
    values = (random.normal(size=(96, 5)) + label[:, None]).astype(np.float32)
    write_file(
        folder / "vectors.h5",
        task="vectors",
        labels={"label": LabelData(values=label, class_names=("a", "b", "c"))},
        split=np.where(np.arange(96) % 4 < 2, 0, np.arange(96) % 4 - 1).astype(np.uint8),
        modalities={"vector": ModalityData(kind="features", values=values)},
    )


def trainer_of(folder: Path, world: World, name: str, stage: int, precision: str, **train: Any) -> Trainer:
    """A trainer of the tiny data with four modalities; metrics.jsonl is written."""
    mine = folder / f"rank_{world.rank}"
    mine.mkdir(exist_ok=True)
    if not (mine / "vectors.h5").exists():
        write_vectors(mine)
    files = ("shapes", "tones", "vectors")
    loaded = tiny_config(
        mine,
        data={"root": str(mine), "num_workers": 0, "tasks": [{"name": one, "file": f"{one}.h5"} for one in files]},
        train={"output": str(folder / name), "steps": STEPS, "batch_size": 24, "precision": precision, **train},
        deepspeed={"zero_stage": stage, "extra": SMALL if stage == 3 else {}},
    )
    setup, _ = prepare(loaded, resume=False)
    callbacks: list[Callback] = [JsonLinesCallback(), CheckpointingCallback(every=0)]
    return Trainer(setup, world, callbacks, StopRequest())


class Changed:
    """A loader whose batch of step BROKEN went through a function."""

    def __init__(self, loader: Any, change: Callable[[PackedBatch], PackedBatch], steps: range) -> None:
        self._loader, self._change, self._steps = loader, change, steps

    def __iter__(self) -> Iterator[PackedBatch]:
        for step, batch in enumerate(self._loader):
            yield self._change(batch) if step in self._steps else batch

    def close(self) -> None:
        self._loader.close()


@contextmanager
def changed(change: Callable[[PackedBatch], PackedBatch], steps: range = range(BROKEN, BROKEN + 1)) -> Iterator[None]:
    """Training gets such batches while the block runs."""
    real = trainer_module.train_loader
    with mock.patch.object(trainer_module, "train_loader", lambda *a, **k: Changed(real(*a, **k), change, steps)):
        yield


def poison(batch: PackedBatch, modality: str, value: float) -> PackedBatch:
    """The first row of a modality gets this value in one place."""
    for values in batch.modalities[modality].fields.values():
        if values.is_floating_point() and len(values):
            values.view(len(values), -1)[0, 0] = value
            break
    return batch


def break_tokens(trainer: Trainer, modality: str, value: float, *, backward: bool) -> Any:
    """At step BROKEN the tokenizer's tokens, or their gradient, are not finite on rank 1, if it has some."""

    def hook(module: Any, inputs: Any, tokens: Any) -> Any:
        values_TD = tokens.values_TD
        if trainer.step != BROKEN or trainer.world.rank != trainer.world.size - 1 or not len(values_TD):
            return tokens
        if backward:
            values_TD.register_hook(lambda gradient: gradient * value)
            return tokens
        return tokens._replace(values_TD=values_TD * value)

    return trainer.engine.model.tokenizers[modality].register_forward_hook(hook)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights, on every rank."""
    own = full_weights(trainer.engine.model, trainer.world, master=trainer.engine.deepspeed.bfloat16_enabled())
    return broadcast_object(own)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight; infinite where one is not finite."""
    far = max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())
    return far if np.isfinite(far) else float("inf")


def events(trainer: Trainer) -> list[dict[str, Any]]:
    """The events of faulty steps in metrics.jsonl, on every rank."""
    found = None
    if trainer.world.is_main:
        lines = (trainer.setup.folder / "metrics.jsonl").read_text().splitlines()
        found = [event for event in map(json.loads, lines) if event["event"] == "left_out"]
    return broadcast_object(found) or []


def job(folder: str, cases: list[Any]) -> list[str]:
    """What was wrong with each case; empty where it went as it must."""
    world = connect(timeout_s=60)
    absent: dict[Any, dict[str, torch.Tensor]] = {}
    wrong = []
    for number, ((stage, precision), place, value, modality) in enumerate(cases):
        key = (stage, precision, modality)
        if key not in absent:
            trainer = trainer_of(Path(folder), world, f"absent_{number}", stage, precision)
            with changed(
                lambda batch, t=trainer, m=modality: leave_out(batch, t.setup.catalogue.tasks, modalities=[m])
            ):
                trainer.run()
            absent[key] = weights_of(trainer)
            trainer.close()
        trainer = trainer_of(Path(folder), world, f"broken_{number}", stage, precision)
        weights = _run_broken(trainer, place, float(value), modality)
        harmless = place == "input" and (value == "nan" or modality == "record")
        wrong.append(_judge(weights, trainer, modality, absent[key], harmless=harmless))
        trainer.close()
    return wrong


def _run_broken(trainer: Trainer, place: str, value: float, modality: str) -> dict[str, torch.Tensor]:
    victim = trainer.world.rank == trainer.world.size - 1
    if place == "input":
        with changed(lambda batch: poison(batch, modality, value) if victim else batch):
            trainer.run()
    else:
        hook = break_tokens(trainer, modality, value, backward=place == "gradient")
        trainer.run()
        hook.remove()
    return weights_of(trainer)


def _judge(
    weights: dict[str, torch.Tensor],
    trainer: Trainer,
    modality: str,
    absent: dict[str, torch.Tensor],
    *,
    harmless: bool,
) -> str:
    """harmless: nothing may be broken, and then nothing is left out: NaN in an input may stand for a missing value, and
    a table's columns go through quantiles, where an infinite value is the largest one.
    """
    found, far = events(trainer), distance(weights, absent)
    if harmless and not found:
        return "" if all(bool(torch.isfinite(one).all()) for one in weights.values()) else "weights are not finite"
    if [event["left_out"] for event in found] != [{"modalities": [modality], "tasks": []}]:
        return f"left out {[event['left_out'] for event in found]}, not {modality}"
    if found[0]["step"] != BROKEN + 1 or not found[0]["samples"]:
        return f"the event is {found[0]}"
    return "" if far <= NEAR else f"weights differ by {far}"


def job_of_many(folder: str, stage: int) -> dict[str, Any]:
    """A modality that is infinite in every step from BROKEN on: the error, the steps done, the checkpoints."""
    world = connect(timeout_s=60)
    trainer = trainer_of(Path(folder), world, f"many_{stage}", stage, "fp32", steps=12, health={"max_faulty": 3})
    error = ""
    with changed(lambda batch: poison(batch, "image", float("inf")), range(BROKEN, 100)):
        try:
            trainer.run()
        except HealthError as problem:
            error = str(problem)
    finite = all(bool(torch.isfinite(one).all()) for one in weights_of(trainer).values())
    return {"error": error, "step": trainer.step, "finite": finite, "events": len(events(trainer))}


def run(nursery: Nursery, folder: Path, count: int) -> Outcome:
    """`count` cases, spread over all."""
    cases = spread(CASES, count)
    (result, *others) = nursery.run(
        "benchmarks.faults.values:job", arguments={"folder": str(folder), "cases": cases}, timeout_s=60 + 20 * count,
        check=True,
    )  # fmt: skip
    wrong = [f"{case}: {text}" for case, text in zip(cases, result.value, strict=True) if text]
    if any(other.value != result.value for other in others):
        wrong.append("ranks differ")
    return Outcome(BROKEN_VALUES, len(cases), wrong)
