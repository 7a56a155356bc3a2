"""How level ranks are: tokens, and what they cost, of the fullest rank over the mean, by two ways of dealing samples.

    MOEMM_SUITE=FOLDER python -m benchmarks.balance          # some minutes on two cores

The ten core tasks of the suite as configs/base/core.yaml draws them; batches of 64 and 256. Tokens are counted in what
the model makes of each sample, not in what the deal expects of its length. All ranks wait for the fullest one in every
micro-batch, so that the mean of max / mean - 1 is the time that is lost, as a share of what would be needed. What of it
shows in the time of a step is measured on two ranks with a thread each, in turn: the mean over steps, then the median
over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.record import Matrix, Row
from benchmarks.runs import CORE, ROOT, deviation, suite, write_config
from moemm.config import load_config
from moemm.data.dataset import SplitDataset
from moemm.data.deal import UNIT, Lengths, cost, deal
from moemm.data.loader import train_loader
from moemm.data.sample import PackedBatch
from moemm.data.shared import held_open
from moemm.distributed import connect
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.testing.distributed import run_distributed
from moemm.train.callbacks import Callback
from moemm.train.lengths import even_length, token_counts
from moemm.train.setup import Setup, prepare, seeded_model

RANKS, BATCHES = (2, 4, 8), (64, 256)
WARM, STEPS, ROUNDS = 5, 40, 5
MODEL = {"dim": 64, "heads": 4, "layers": 2, "experts": {"groups": [{"kind": "shared", "width": 64}]}}
COLUMNS = {f"{ranks} ranks": f"fullest rank, {ranks} ranks" for ranks in RANKS}


class Batch:
    """A global batch: true tokens of its samples, and those expected of their lengths, in order."""

    def __init__(self, batch: PackedBatch, model: Model, datasets: Sequence[SplitDataset], lengths: Sequence[Lengths]):
        with torch.no_grad():
            stream = model.eval().tokenize(batch)
        self.true = torch.bincount(stream.sample_T, minlength=batch.num_samples).tolist()
        self.told = []
        for row, (task, index) in enumerate(zip(batch.task.tolist(), batch.index.tolist(), strict=True)):
            item = int(np.flatnonzero(datasets[task].indices == index)[0])
            assert lengths[task].num_modalities(item) == int(batch.presence[row].sum())
            self.told.append(lengths[task].tokens(item, None))


def shares_of(batch: Batch, ranks: int, *, way: str, even: int) -> list[list[int]]:
    """Positions of each rank's samples. way: `samples` or `tokens`."""
    if way == "samples":
        return np.split(np.arange(len(batch.true)), ranks)  # type: ignore[return-value]
    return deal([cost(tokens, even=even) for tokens in batch.told], ranks)


def excess(loads: Sequence[float], shares: Sequence[Sequence[int]]) -> float:
    """How much more than the mean the fullest rank has, in per cent."""
    sums = [sum(loads[position] for position in share) for share in shares]
    return 100.0 * (max(sums) / (sum(sums) / len(sums)) - 1.0)


def rows_of(batches: Sequence[Batch], *, size: int, even: int) -> list[Row]:
    """The mean excess of tokens and of cost for both ways and each number of ranks; deviation over batches."""
    rows = []
    for way in ("samples", "tokens"):
        for what in ("tokens", "cost"):
            for ranks in RANKS:
                found = []
                for batch in batches:
                    costs = [cost(UNIT * tokens, even=even) for tokens in batch.true]
                    loads = batch.true if what == "tokens" else costs
                    found.append(excess(loads, shares_of(batch, ranks, way=way, even=even)))
                rows.append(
                    Row(
                        case=f"batch of {size}, dealt by {way}: {what}", metric=COLUMNS[f"{ranks} ranks"],
                        value=float(np.mean(found)), deviation=float(np.std(found)), unit="% over the mean",
                        better="lower",
                    )
                )  # fmt: skip
    return rows


def setup_of(folder: Path, size: int, *more: str) -> Setup:
    """The core tasks with batches of a size."""
    values: dict[str, Any] = {"base": [str(CORE)], "name": "balance", "model": MODEL}
    values["train"] = {"output": str(folder / f"run_{size}"), "steps": 100, "batch_size": size}
    path = write_config(folder / f"balance_{size}.yaml", values)
    setup, _ = prepare(load_config(path, [f"data.root={suite()}", "data.num_workers=0", *more]), resume=False)
    return setup


class Clock(Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step(self, trainer: Any, *, stopping: bool) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())


def timed(folder: str, way: str, size: int) -> float:
    """Mean seconds of a step on this rank, one of some that share a batch."""
    from moemm.train.signals import StopRequest
    from moemm.train.trainer import Trainer

    world, clock = connect(timeout_s=300), Clock()
    mine = Path(folder) / str(world.rank)
    mine.mkdir(parents=True, exist_ok=True)
    more = [f"train.output={folder}/run", f"train.steps={WARM + STEPS}", "train.log_every=100000", f"data.deal={way}"]
    trainer = Trainer(setup_of(mine, size, *more), world, [clock], StopRequest())
    trainer.run()
    trainer.close()
    return (clock.ends[-1] - clock.ends[WARM - 1]) / STEPS if world.is_main else 0.0


def time_rows(folder: Path, size: int, rounds: int) -> list[Row]:
    """Time of a step of two ranks, dealt by tokens, over that of the same steps dealt by samples."""
    ratios, seconds = [], []
    for number in range(rounds):
        found = {}
        for way in ("samples", "tokens"):
            arguments = {"folder": str(folder / f"{way}_{size}_{number}"), "way": way, "size": size}
            job = run_distributed("benchmarks.balance:timed", arguments=arguments, path=[ROOT], timeout_s=600)
            found[way] = job[0].value
        ratios.append(found["tokens"] / found["samples"])
        seconds.append(found["samples"])
    case = f"batch of {size}, a step of 2 ranks"
    return [
        Row(case=case, metric="dealt by samples", value=1000 * statistics.median(seconds), unit="ms", better="lower"),
        Row(case=case, metric="by tokens / by samples", value=statistics.median(ratios), deviation=deviation(ratios),
            better="lower"),
    ]  # fmt: skip


def measured(folder: Path, size: int, count: int) -> list[Batch]:
    """The first batches of a run."""
    setup = setup_of(folder, size)
    model, functions = seeded_model(setup, torch.device("cpu")), prepare_functions(setup.specs)
    counts = token_counts(model, setup.catalogue, functions)
    datasets = [SplitDataset(setup.catalogue, task=task.name, split="train") for task in setup.catalogue.tasks]
    lengths = [Lengths(dataset, counts, functions) for dataset in datasets]
    with train_loader(setup.catalogue, setup.config, prepare=functions) as loader:
        return [Batch(batch, model, datasets, lengths) for batch in islice(loader, count)]


def main() -> None:
    """Measure, write results/balance.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=40, help="batches of each size")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of runs on two ranks")
    options = parser.parse_args()
    count = options.batches
    began, even, rows = time.perf_counter(), even_length(MODEL["dim"]), []  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder, held_open():
        for size in BATCHES:
            batches = measured(Path(folder), size, count)
            rows += rows_of(batches, size=size, even=even) + time_rows(Path(folder), size, options.rounds)
            if size == BATCHES[0]:
                true = np.concatenate([batch.true for batch in batches])
                told = np.concatenate([batch.told for batch in batches]) / UNIT
                rows.append(
                    Row(
                        case="tokens of a sample, told from its length", metric="mean error",
                        value=float(100 * np.abs(told - true).mean() / true.mean()), unit="%", better="lower",
                    )
                )  # fmt: skip
                low, mid, high = np.percentile(true, [0, 50, 100])
                rows += [
                    Row(case="tokens of a sample", metric=name, value=float(value), better="lower")
                    for name, value in (("least", low), ("median", mid), ("most", high))
                ]
    matrix = Matrix(title="fullest rank over the mean", columns=COLUMNS, digits=1)
    path = record.write("balance", rows, seeds=[0], seconds=time.perf_counter() - began, matrices=[matrix])
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
