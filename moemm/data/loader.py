"""Batches from worker processes, in an order and with randomness that do not depend on how many there are.

A worker never raises: it sends what went wrong as text, so that the message arrives as it was written.
"""

from __future__ import annotations

import multiprocessing
import re
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from moemm.config.check_objectives import label_free
from moemm.config.schema import Config
from moemm.data.catalogue import Catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.deal import Dealt, Lengths, TokenDeal
from moemm.data.flat import FlatBatch, flatten, unflatten
from moemm.data.labels import labelled_items
from moemm.data.mixture import Bags, Draw, MixtureSampler
from moemm.data.pack import Packer
from moemm.data.quarantine import Bad, first_sound
from moemm.data.sample import PackedBatch, Prepare, Sample
from moemm.data.within import read_within
from moemm.errors import ConfigError, DataError, MoemmError

_DROPOUT = 2  # what a random stream is for; 0 and 1 are the sampler's
_DEATH = re.compile(r"DataLoader worker .*(exited unexpectedly|killed by signal)")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What a worker sends in place of a batch."""

    kind: type[MoemmError]
    message: str


@dataclass(frozen=True, slots=True)
class Dropout:
    """Probability of taking a modality away: from `start` to `end` in a straight line over `draws`, then `end`."""

    start: float = 0.0
    end: float = 0.0
    draws: int = 1

    @classmethod
    def of(cls, config: Config, *, total_steps: int | None) -> Dropout:
        """That of a configuration whose run has `total_steps`; without a schedule they need not be known."""
        data, end = config.data, config.data.modality_dropout
        if data.modality_dropout_start is None:
            return cls(end, end)
        assert total_steps is not None, "a schedule needs the number of steps"
        steps = max(1, round((data.modality_dropout_over or 1.0) * total_steps))
        return cls(data.modality_dropout_start, end, steps * config.train.batch_size)

    def at(self, draw: int) -> float:
        """The probability at draw number `draw` since the start of training."""
        return self.start + (self.end - self.start) * min(1.0, draw / self.draws)


class TrainSamples:
    """Draws -> samples of the train splits, some modalities taken away. Keyed by draw, not by worker.

    Draws count the groups of tasks that share their samples as one task each. Another sample stands in for a broken one
    (data/quarantine.py); `take_bad` tells which.
    groups: those that are drawn from; all when not given. items: for each of them the items of its train split that are
    drawn from; all when not given. dealt: of the draws of all ranks, give only the samples that one of them gets;
    prepare: what it needs for the lengths of texts.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        modality_dropout: Dropout = Dropout(),
        seed: int = 0,
        groups: Sequence[Sequence[int]] | None = None,
        items: Sequence[np.ndarray] | None = None,
        dealt: Dealt | None = None,
        prepare: Prepare | None = None,
    ) -> None:
        first = [catalogue.tasks[group[0]].name for group in groups or catalogue.groups]
        self._datasets = [SplitDataset(catalogue, task=name, split="train") for name in first]
        for dataset in self._datasets:
            dataset.open()  # here, so that workers and evaluations share it
        self._dropout, self._seed, self._items = modality_dropout, seed, items
        self._bad: list[Bad] = []
        self._deal: TokenDeal | None = None
        if dealt is not None and dealt.ranks > 1:
            lengths = [Lengths(dataset, dealt.counts, prepare or {}) for dataset in self._datasets]
            self._deal = TokenDeal(lengths, even=dealt.even, rank=dealt.rank, ranks=dealt.ranks)

    def bags(self) -> list[Bags | None]:
        """For each group what of its items belongs together; None where nothing does."""
        found: list[Bags | None] = []
        for number, dataset in enumerate(self._datasets):
            bag = dataset.bags
            if bag is not None and self._items is not None:
                bag = bag[self._items[number]]
            found.append(None if bag is None else Bags(bag, dataset.task.together))
        return found

    def __call__(self, draws: Sequence[Draw]) -> list[Sample]:
        """The samples of `draws`, in order; with `dealt` those of one rank."""
        if self._deal is not None:
            draws = [draws[position] for position in self._deal.share([self._known(draw) for draw in draws])]
        samples = [self._read(draw) for draw in draws]
        for sample, draw in zip(samples, draws, strict=True):
            self._take_away(sample, draw.number)
        return samples

    def _known(self, draw: Draw) -> tuple[int, int, np.ndarray | None]:
        """What the deal needs to know of a draw, without reading its sample."""
        assert self._deal is not None
        item = draw.item if self._items is None else int(self._items[draw.task][draw.item])
        return draw.task, item, self._goes(self._deal.num_modalities(draw.task, item), draw.number)

    def _read(self, draw: Draw) -> Sample:
        dataset, items = self._datasets[draw.task], None if self._items is None else self._items[draw.task]

        def read(number: int) -> Sample:
            return dataset.sound(number if items is None else int(items[number]))

        sample, bad = first_sound(read, draw.item, len(dataset) if items is None else len(items))
        self._bad += bad
        return sample

    def take_bad(self) -> list[Bad]:
        """The samples that were put aside since the last call."""
        bad, self._bad = self._bad, []
        return bad

    def _take_away(self, sample: Sample, number: int) -> None:
        names = list(sample.modalities)
        goes = self._goes(len(names), number)
        if goes is not None:
            kept = [name for name, gone in zip(names, goes, strict=True) if not gone]
            sample.modalities = {name: sample.modalities[name] for name in kept}

    def _goes(self, count: int, number: int) -> np.ndarray | None:
        """Which of a draw's modalities go, each with the probability of the draw; if all would, one drawn evenly stays.
        None: none goes.
        """  # fmt: skip
        probability = self._dropout.at(number)
        if count < 2 or not probability:
            return None
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed % 2**63, _DROPOUT, number])))
        goes = np.asarray(random.random(count) < probability)
        stays = int(random.integers(count))
        if goes.all():
            goes[stays] = False
        return goes


class Samples(Protocol):
    """Samples by number, as SplitDataset and GivenSamples have them."""

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> Sample: ...

    def present(self) -> np.ndarray:
        """(n,) bool: which samples have a modality left."""
        ...


class SplitSamples:
    """Items of one split, or of a file -> samples."""

    def __init__(self, dataset: Samples) -> None:
        self._dataset = dataset

    def __call__(self, items: Sequence[int]) -> list[Sample]:
        """The samples of `items`, in order."""
        return [self._dataset[item] for item in items]


class BatchLoader:
    """Iterates over packed batches, one for each key of `order`. Close it, or use it as a context manager.

    Raises DataError where a worker met one, with its own message, or where a worker died.
    """

    def __init__(
        self, read: Any, packer: Packer, order: Iterable[Any], *, num_workers: int, prefetch: int = 2, skipped: int = 0
    ) -> None:
        self.num_skipped = skipped
        """Samples that are left out because they have nothing left."""
        self.bad: list[Bad] = []
        """Broken samples of the batches so far that others stand in for; whoever reads them may clear them."""
        context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else None)
        self._loader: DataLoader[FlatBatch | _Failure] = DataLoader(
            _Batches(read, packer),
            sampler=order,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=prefetch if num_workers else None,
            multiprocessing_context=context if num_workers else None,
            worker_init_fn=_ignore_signals,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own, so that making an iterator leaves the global random state alone
        )
        self._iterator: Any = None

    def __iter__(self) -> Iterator[PackedBatch]:
        self.close()
        self._iterator = iter(self._loader)
        return self

    def __next__(self) -> PackedBatch:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            flat = next(self._iterator)
        except StopIteration:
            self.close()
            raise
        except (RuntimeError, ConnectionError, EOFError) as error:
            self.close()
            if isinstance(error, RuntimeError) and not _DEATH.search(str(error)):
                raise
            raise DataError(
                f"a worker process of the data loader died ({str(error).splitlines()[0]})\n"
                "  allowed: workers that live as long as the run\n"
                "  to do: give it more memory, or lower data.num_workers and data.prefetch; 0 workers shows the error"
            ) from error
        if isinstance(flat, _Failure):
            self.close()
            raise flat.kind(flat.message)
        self.bad += flat.bad
        return unflatten(flat)

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes. Iterating again starts from the beginning."""
        iterator, self._iterator = self._iterator, None
        if iterator is None or not self._loader.num_workers:
            return
        iterator._shutdown_workers()
        for worker in iterator._workers:
            if worker.is_alive():
                worker.kill()
            worker.join()


class _Batches(torch.utils.data.Dataset[Any]):
    """key -> flat batch, in the worker."""

    def __init__(self, read: Any, packer: Packer) -> None:
        self._read, self._packer = read, packer

    def __getitem__(self, key: Any) -> FlatBatch | _Failure:
        try:
            samples = self._read(key)
            return flatten(self._packer(samples), getattr(self._read, "take_bad", tuple)())
        except MoemmError as error:
            return _Failure(DataError if isinstance(error, DataError) else type(error), str(error))


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(worker: int) -> None:
    """Ctrl-C and the scheduler's signals reach every process: the trainer decides when the workers end."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def learning_groups(config: Config, catalogue: Catalogue) -> list[tuple[int, ...]]:
    """Of the groups of tasks that share their samples those of which some task learns, by `learn`."""
    learns = {task.name for task in config.data.tasks if task.learn}
    return [group for group in catalogue.groups if any(catalogue.tasks[number].name in learns for number in group)]


def drawn_sizes(config: Config, catalogue: Catalogue) -> list[int]:
    """How many training samples of each group of tasks that learns are drawn from: all, or those with a label, where
    nothing else learns.
    """  # fmt: skip
    items = _drawn_items(config, catalogue)
    if items is not None:
        return [len(one) for one in items]
    return [catalogue.tasks[first].sizes["train"] for first, *_ in learning_groups(config, catalogue)]


def _drawn_items(config: Config, catalogue: Catalogue) -> list[np.ndarray] | None:
    if config.data.label_share >= 1.0 or label_free(config.objectives):
        return None
    items = labelled_items(catalogue, share=config.data.label_share, seed=config.train.seed)
    return [
        np.unique(np.concatenate([items[number] for number in group])) for group in learning_groups(config, catalogue)
    ]


def _labels(config: Config, catalogue: Catalogue) -> list[np.ndarray] | None:
    """Those of `data.within`, of the samples that are drawn."""
    if config.data.within is None:
        return None
    items = _drawn_items(config, catalogue)
    labels = read_within(Path(config.data.within), catalogue, learning_groups(config, catalogue))
    return labels if items is None else [one[own] for one, own in zip(labels, items, strict=True)]


def train_loader(
    catalogue: Catalogue,
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    total_steps: int | None = None,
    prepare: Prepare | None = None,
    seed: int | None = None,
    dealt: Dealt | None = None,
) -> BatchLoader:
    """Micro-batches of this rank, in order, from step `start_step`, without end.

    dealt: give each rank about as much to compute (its rank and ranks are set here), not as many samples.
    total_steps: steps of the whole run, which the schedule of the modality dropout ends with.
    prepare: modality name -> function that workers run on each value. seed: of the order; `train.seed` by default.
    Raises ConfigError: a batch size that cannot be shared out evenly.
    """
    seed = config.train.seed if seed is None else seed
    dropout = Dropout.of(config, total_steps=total_steps)
    items = _drawn_items(config, catalogue)
    groups = learning_groups(config, catalogue)
    if dealt is not None:
        dealt = replace(dealt, rank=rank, ranks=world_size)
    read = TrainSamples(
        catalogue, modality_dropout=dropout, seed=seed, groups=groups, items=items, dealt=dealt, prepare=prepare
    )
    sampler = MixtureSampler(
        drawn_sizes(config, catalogue),
        temperature=config.data.temperature,
        seed=seed,
        batch_size=config.train.batch_size,
        rank=rank,
        world_size=world_size,
        accumulation=config.train.accumulation,
        start_step=start_step,
        bags=read.bags(),
        labels=_labels(config, catalogue),
        whole=dealt is not None,
    )
    packer = Packer(catalogue, prepare)
    return BatchLoader(read, packer, sampler, num_workers=config.data.num_workers, prefetch=config.data.prefetch)


def eval_loader(
    catalogue: Catalogue,
    *,
    task: str,
    split: str,
    batch_size: int,
    prepare: Prepare | None = None,
    drop: Collection[str] = (),
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> BatchLoader:
    """One pass over a split of a task. Every rank gets equally many batches, some of them without samples at the end.

    drop: modalities to take away. Samples that have nothing left are in no batch; `num_skipped` counts them.
    Raises ConfigError: no such task, split or modality. DataError: an empty split.
    """
    unknown = [name for name in drop if name not in [info.name for info in catalogue.modalities]]
    if unknown:
        have = ", ".join(info.name for info in catalogue.modalities)
        raise ConfigError(f"drop: this run has no modality {unknown[0]!r}; it has {have}")
    dataset = SplitDataset(catalogue, task=task, split=split, drop=drop)
    if not len(dataset):
        raise DataError(
            f"{dataset.task.file}: /split: no sample of split {split} (task {task})\n"
            f"  allowed: splits that have samples: {', '.join(s for s, n in dataset.task.sizes.items() if n)}\n"
            "  to do: name one of these, or mark samples in /split"
        )
    return one_pass(
        catalogue,
        dataset,
        batch_size=batch_size,
        prepare=prepare,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )


def one_pass(
    catalogue: Catalogue,
    dataset: Samples,
    *,
    batch_size: int,
    prepare: Prepare | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> BatchLoader:
    """This rank's batches of all samples that have a modality left, in their order; `num_skipped` counts the others."""
    kept = np.flatnonzero(dataset.present()).tolist()
    wide = batch_size * world_size
    starts = range(rank * batch_size, rank * batch_size + len(kept) + (-len(kept)) % wide, wide)
    order = [kept[start : start + batch_size] for start in starts]
    skipped = len(dataset) - len(kept)
    return BatchLoader(
        SplitSamples(dataset), Packer(catalogue, prepare), order, num_workers=num_workers, skipped=skipped
    )
