"""What settling conflicts costs, at the fork and at the trunk: CPU time, memory and what is sent, beside the plain sum.

    python -W ignore -m benchmarks.harmonize           # some minutes on one core

The model of configs/recipes/conflict.yaml on batches of 64 clips of avclip, with 2, 4, 8 and 16 labels of each sample:
the digit, and random ones, which is enough for time. Every way computes forward and backward of the same batch, one
after the other in each round, on one thread. TorchJD gets the same features: `mtl_backward` and `jac_to_grad` with
UPGrad, one pass of the trunk's backward for each loss. At the trunk there is one pass backward for each loss and for
the rest, as in training with ZeRO 0 to 2, but without DeepSpeed. Memory is the most that tensors hold at a time in a
step, on top of what the plain sum needs; what the trunk sends is counted from shapes: the gradients of all passes but
one, and its small messages.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks import record, runs
from benchmarks.record import Row
from moemm.config import load_config
from moemm.data.catalogue import TaskInfo
from moemm.data.loader import train_loader
from moemm.data.sample import PackedBatch
from moemm.harmonize import Fork, Readers, Settler
from moemm.modalities import prepare_functions
from moemm.models import Model, build_model
from moemm.train.setup import prepare
from moemm.train.trunk import TrunkGradients

TARGETS = {2: 1.03, 4: 1.05, 8: 1.10, 16: 1.15}
WAYS = {"upgrad a sample": ("upgrad", "sample"), "realign a sample": ("realign", "sample"),
        "upgrad a batch": ("upgrad", "batch"), "mgda a batch": ("mgda", "batch")}  # fmt: skip
DEFAULT, PEER, TRUNK = "upgrad a sample", "TorchJD, UPGrad", "upgrad at the trunk"
Step = Callable[[PackedBatch], None]


class Tap(nn.Module):
    """In the fork's place: keeps the stream, whose gradients TorchJD takes."""

    per, drops = "sample", False

    def forward(self, x_TD: torch.Tensor, readers: Readers) -> tuple[torch.Tensor, ...]:
        """The stream itself for every branch."""
        self.x_TD = x_TD
        return (x_TD,) * readers.loss_BT.shape[0]


class Alone:
    """In the engine's place: one process, whole gradients."""

    shares_gradient, keeps_graph = False, True

    def __init__(self, model: Model) -> None:
        self.parameters = list(model.parameters())

    def accumulate(self, loss: torch.Tensor, *, last: bool, retain_graph: bool = False) -> None:
        """Backward."""
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def take_gradient(self) -> list[torch.Tensor]:
        """The gradients themselves: nobody else has them."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return [one.flatten() for one in found]


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

    def trunk(self, settler: Settler) -> Step:
        """A pass backward for each loss and one for the rest, then the weighted sum."""
        model = copy.deepcopy(self.model)
        engine, num = Alone(model), len(self.tasks)

        def forward(batch: PackedBatch, again: bool) -> Callable[[int], torch.Tensor]:
            losses = torch.stack(self.losses(model, batch))
            return lambda number: (losses * torch.eye(num + 1)[number, :num]).sum()

        def run(batch: PackedBatch) -> None:
            gradients = TrunkGradients.of_step(engine, [batch], forward, num_losses=num, rest=True)
            for parameter, one in zip(engine.parameters, gradients.settled(settler)[0], strict=True):
                parameter.grad = one.view_as(parameter)
            model.zero_grad()

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
    steps[TRUNK] = setting.trunk(Settler("upgrad", names))
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
    rows += memory(setting, {way: steps[way] for way in ("plain", DEFAULT, TRUNK, PEER)})
    sizes = [parameter.numel() for parameter in setting.model.parameters()]
    gradients = num * 4 * sum(sizes) + 8 * (num * len(sizes) + num * num)
    for way, value in (("a batch", sent[0]), ("the trunk, ZeRO 1 to 3", gradients)):
        rows.append(
            Row(case=f"{num} losses, {way}", metric="sent a step", value=float(value), unit="bytes", better="lower")
        )
    return rows, statistics.median(seconds["plain"]) / len(setting.batches)


def memory(setting: Setting, steps: dict[str, Step]) -> list[Row]:
    """What each way holds at most in a step, beyond the plain sum."""
    peaks = {way: peak(lambda step=step: step(setting.batches[0])) for way, step in steps.items()}  # type: ignore[misc]
    return [
        Row(case=f"{len(setting.tasks)} losses, {way}", metric="memory on top of the plain sum",
            value=(value - peaks["plain"]) / 2**20, unit="MiB", better="lower")
        for way, value in peaks.items() if way != "plain"
    ]  # fmt: skip


def peak(run: Callable[[], None]) -> int:
    """Bytes that tensors hold at most while `run` runs, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


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
