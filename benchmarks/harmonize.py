"""What settling conflicts at the fork costs: CPU time of a step, relative to the plain sum of the same losses.

    python -W ignore -m benchmarks.harmonize           # some minutes on one core

The model of configs/recipes/conflict.yaml on batches of 64 clips of avclip, with 2, 4, 8 and 16 labels of each sample:
the digit, and random ones, which is enough for time. Every way computes forward and backward of the same batch, one
after the other in each round, on one thread. TorchJD gets the same features: `mtl_backward` and `jac_to_grad` with
UPGrad, one pass of the trunk's backward for each loss.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import record, runs
from benchmarks.record import Row
from moemm.config import load_config
from moemm.data.catalogue import TaskInfo
from moemm.data.loader import train_loader
from moemm.data.sample import PackedBatch
from moemm.harmonize import Fork, Readers
from moemm.modalities import prepare_functions
from moemm.models import Model, build_model
from moemm.train.setup import prepare

TARGETS = {2: 1.03, 4: 1.05, 8: 1.10, 16: 1.15}
WAYS = {"upgrad a sample": ("upgrad", "sample"), "realign a sample": ("realign", "sample"),
        "upgrad a batch": ("upgrad", "batch"), "mgda a batch": ("mgda", "batch")}  # fmt: skip
DEFAULT, PEER = "upgrad a sample", "TorchJD, UPGrad"
Step = Callable[[PackedBatch], None]


class Tap(nn.Module):
    """In the fork's place: keeps the stream, whose gradients TorchJD takes."""

    def forward(self, x_TD: torch.Tensor, readers: Readers) -> tuple[torch.Tensor, ...]:
        """The stream itself for every branch."""
        self.x_TD = x_TD
        return (x_TD,) * readers.loss_BT.shape[0]


class Setting:
    """The recipe's model with `num` labels of each sample, and a few batches."""

    def __init__(self, folder: Path, num: int, *, batches: int = 4) -> None:
        recipe = runs.ROOT / "configs" / "recipes" / "conflict.yaml"
        loaded = load_config(recipe, [f"train.output={folder / str(num)}", "data.num_workers=0"])
        setup, _ = prepare(loaded, resume=False)
        first = setup.catalogue.tasks[0]
        self.tasks = [
            first if number == 0 else replace(first, name=f"label_{number}", drawn_with=first.name)
            for number in range(num)
        ]
        torch.manual_seed(0)
        self.model = build_model(loaded.config.model, specs=setup.specs, tasks=self.tasks).train()
        loader = train_loader(
            setup.catalogue, loaded.config, rank=0, world_size=1, start_step=0, prepare=prepare_functions(setup.specs)
        )
        with loader:
            found = iter(loader)
            self.batches = [self._labelled(next(found), first) for _ in range(batches)]

    def _labelled(self, batch: PackedBatch, first: TaskInfo) -> PackedBatch:
        targets = {task.name: torch.randint(task.outputs, (batch.num_samples,)) for task in self.tasks[1:]}
        return replace(batch, targets={first.name: batch.targets[first.name], **targets})

    def losses(self, model: Model, batch: PackedBatch) -> list[torch.Tensor]:
        """One loss a label."""
        outputs = model(batch).outputs
        return [F.cross_entropy(outputs[task.name], batch.targets[task.name]) for task in self.tasks]

    def step(self, fork: Fork | None) -> Step:
        """Forward and backward with a fork, or with the plain sum."""
        model = copy.deepcopy(self.model)
        model.fork = fork

        def run(batch: PackedBatch) -> None:
            model.zero_grad()
            torch.stack(self.losses(model, batch)).sum().backward()  # type: ignore[no-untyped-call]

        return run

    def torchjd(self) -> Step:
        """The same by TorchJD."""
        from torchjd.aggregation import UPGrad
        from torchjd.autojac import jac_to_grad, mtl_backward

        model, tap, aggregator = copy.deepcopy(self.model), Tap(), UPGrad()
        model.fork = tap  # type: ignore[assignment]
        shared = [p for name, p in model.named_parameters() if name.startswith(("trunk", "tokenizers", "modality_D"))]

        def run(batch: PackedBatch) -> None:
            model.zero_grad()
            losses = self.losses(model, batch)
            mtl_backward(losses, features=tap.x_TD, parallel_chunk_size=1)
            jac_to_grad([p for p in shared if getattr(p, "jac", None) is not None], aggregator)

        return run


def measure(folder: Path, num: int, rounds: int) -> tuple[list[Row], float]:
    """Rows for `num` losses; seconds of CPU time of a plain step."""
    setting, sent = Setting(folder, num), [0]

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        sent[0] = tensor.numel() * tensor.element_size()
        return tensor

    names = [task.name for task in setting.tasks]
    steps = {"plain": setting.step(None)}
    for way, (method, per) in WAYS.items():
        steps[way] = setting.step(Fork(method, names, per=per, reduce=reduce))
    steps[PEER] = setting.torchjd()
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(rounds + 1):
        for way, step in steps.items():
            began = time.process_time()
            for batch in setting.batches:
                torch.manual_seed(number)
                step(batch)
            if number:  # the first round warms up
                seconds[way].append(time.process_time() - began)
    rows = []
    for way, values in seconds.items():
        if way == "plain":
            continue
        ratios = [value / plain for value, plain in zip(values, seconds["plain"], strict=True)]
        target = TARGETS[num] if way == DEFAULT else None
        rows.append(
            Row(case=f"{num} losses, {way}", metric="CPU time / plain sum", value=statistics.median(ratios),
                better="lower", target=target)
        )  # fmt: skip
    rows.append(
        Row(case=f"{num} losses, a batch", metric="sent a step", value=float(sent[0]), unit="bytes", better="lower")
    )
    return rows, statistics.median(seconds["plain"]) / len(setting.batches)


def main() -> None:
    """Measure, write results/harmonize.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--losses", type=int, nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for num in options.losses:
            found, plain_s = measure(Path(folder), num, options.rounds)
            rows += [
                *found,
                Row(case=f"{num} losses, plain sum", metric="CPU time of a step", value=1e3 * plain_s, unit="ms"),
            ]
            print(*(f"{one.case}: {one.value:.3f}" for one in found), sep="\n", flush=True)
    path = record.write("harmonize", rows, seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
