"""What watching the routers costs: the time of statistics, figures and alarm, as a share of the step's.

    python -W ignore -m benchmarks.router_overhead           # two minutes on one core

The quickstart's model and batches, on one thread. Every step is computed once and given to two sets of window and
writers (metrics.jsonl, TensorBoard), one of which sees nothing of the routers. What they take is timed by itself and
subtracted: a difference of whole steps would drown in the machine's noise. With: the sums, the report, the lines, the
charts, the heat maps, the alarm. What the routers themselves sum up is in the step: the balance loss needs it.

Times are CPU times of the process with all its threads, that of TensorBoard's writer too.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.record import Row
from moemm.config import load_config
from moemm.data.loader import train_loader
from moemm.distributed import connect
from moemm.modalities import prepare_functions
from moemm.observe.alarm import RoutingAlarm
from moemm.observe.records import Metrics, RunInfo
from moemm.train.callbacks import JsonLinesCallback, TensorBoardCallback
from moemm.train.routing import routing_names
from moemm.train.setup import prepare, seeded_model
from moemm.train.step import Objective, Window

RECIPE = "configs/recipes/quickstart.yaml"
TARGET = 0.02


class Setting:
    """A model, batches, and two sets of writers: index 0 sees nothing of the routers, 1 everything."""

    def __init__(self, folder: Path, *, experts: int) -> None:
        groups = [{"kind": "shared", "width": 128}, {"kind": "modality", "width": 64}]
        groups.append({"kind": "routed", "count": experts, "width": 64})
        overrides = [f"train.output={folder / 'run'}", f"model.experts.groups={groups}", "data.num_workers=0"]
        self.config = load_config(RECIPE, overrides).config
        setup, _ = prepare(load_config(RECIPE, overrides), resume=False)
        world = connect(timeout_s=60.0)
        self.model = seeded_model(setup, torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.objective = Objective(
            setup.catalogue, self.config, world, total_steps=10**9, allowed_LME=self.model.trunk.allowed()
        )
        loader = train_loader(
            setup.catalogue, self.config, rank=0, world_size=1, start_step=0, prepare=prepare_functions(setup.specs)
        )
        with loader:
            batches = iter(loader)
            self.batches = [next(batches) for _ in range(self.config.train.log_every)]
        self.windows = [Window(setup.catalogue.tasks, self.config, world) for _ in range(2)]
        names = routing_names(self.model.trunk)
        self.alarm = RoutingAlarm(names, advice="")
        self.writers: list[list[Any]] = []
        for seen in (False, True):
            info = RunInfo(
                name="r", folder=str(folder / str(seen)), tasks=tuple(t.name for t in setup.catalogue.tasks),
                modalities=tuple(m.name for m in setup.catalogue.modalities), start_step=0, total_steps=10**9,
                routing=names if seen else None,
            )  # fmt: skip
            (folder / str(seen)).mkdir()
            self.writers.append([JsonLinesCallback(), TensorBoardCallback()])
            for writer in self.writers[-1]:
                writer.on_start(info)
        self.step = 0

    def round(self) -> tuple[float, float, float]:
        """Seconds of log_every steps, and of their observation without and with the routers."""
        step_s, observed_s = 0.0, [0.0, 0.0]
        for batch in self.batches:
            began = time.process_time()
            output = self.model(batch)
            loss = self.objective(output, batch)
            self.optimizer.zero_grad()
            loss.backward.backward()
            self.optimizer.step()
            step_s += time.process_time() - began
            self.step += 1
            for seen in self.turns():
                given = output if seen else replace(output, router=None)
                work = functools.partial(self.windows[seen].add, loss, given)
                observed_s[seen] += timed(work)
        for seen in self.turns():
            observed_s[seen] += timed(functools.partial(self.report, seen))
        return step_s, observed_s[0], observed_s[1]

    def turns(self) -> tuple[bool, bool]:
        """Who goes first, in turn."""
        return (False, True) if self.step % 2 else (True, False)

    def report(self, seen: bool) -> None:
        """What the trainer does every log_every steps."""
        means = self.windows[seen].take()
        metrics = Metrics(
            step=self.step, total_steps=10**9, loss=means.loss, router_loss=means.router_loss,
            losses=means.losses, accuracy=means.accuracy, lr=1e-3, grad_norm=1.0, tokens_per_second=1.0, seconds=1.0,
            seconds_left=1.0, routing=means.routing,
        )  # fmt: skip
        for writer in self.writers[seen]:
            writer.on_metrics(metrics)
        if seen:
            self.alarm.check(means.routing)

    def close(self) -> None:
        """Close the writers' files."""
        for writer in (one for both in self.writers for one in both):
            writer.on_close()


def measure(experts: int, rounds: int) -> list[Row]:
    """Rows of one size of the expert map."""
    with tempfile.TemporaryDirectory() as temporary, collected():
        setting = Setting(Path(temporary), experts=experts)
        setting.round()
        found = [setting.round() for _ in range(rounds)]
        setting.close()
    steps = setting.config.train.log_every
    # Heat maps come once in many windows, so a mean and not a median: their share is in it.
    step_s, plain_s, seen_s = (statistics.mean(one) for one in zip(*found, strict=True))
    extra = [(seen - plain) / (step_s + plain_s) for _, plain, seen in found]
    case = f"quickstart, {experts} routed experts, a report every {steps} steps"
    deviation = statistics.stdev(extra) / len(extra) ** 0.5
    return [
        Row(case=case, metric="step", value=1e3 * step_s / steps, unit="ms", better="lower"),
        Row(case=case, metric="statistics and figures / step", value=(seen_s - plain_s) / (step_s + plain_s),
            deviation=deviation, better="lower", target=TARGET),
        Row(case=case, metric="the same, median window", value=statistics.median(extra), better="lower"),
    ]  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """CPU seconds of the process."""
    began = time.process_time()
    work()
    return time.process_time() - began


@contextmanager
def collected() -> Iterator[None]:
    """The garbage collector runs before and after, not in between: it would strike at random."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = [row for experts in (4, 64) for row in measure(experts, options.rounds)]
    path = record.write("router_overhead", rows, seeds=[0], seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
