"""The order in which training samples are drawn: a pure function of (seed, epoch, index), so its state is one integer.

An epoch has as many draws as the train splits have samples together. Task t gets a fixed number of them, proportional
to n_t^(1/temperature). Within a task the draws go through one permutation of its samples after the other, across
epochs, so that every sample is drawn once before any is drawn twice. A permutation of the epoch's draws then mixes the
tasks. Tasks that share their samples (`Catalogue.groups`) are one task here.

Where samples of a task are of one thing (a bag) and are to meet in a batch, both permutations keep some of them
together: a bag is cut into runs, and a run is moved to where its first sample stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from moemm.errors import ConfigError

_EPOCH, _TASK, _WITHIN = 0, 1, 4  # what a random stream is for
_KEPT = 8


class Draw(NamedTuple):
    """One draw: which task, which item of its train split, and its number since the start of training."""

    task: int
    item: int
    number: int


class Bags(NamedTuple):
    """bag: (n,) int64 the bag of each item of a task. together: how many of one bag are drawn one after the other."""

    bag: np.ndarray
    together: int


class MixtureSampler:
    """Batches of draws. Global batch `step` is the same for every world size and accumulation.

    sizes: samples of each task's train split. batch_size: draws a step over all ranks and micro-batches.
    bags: for each task the runs that its samples are drawn in; None: one by one.
    labels: of each task (n,), of its samples; a batch then holds draws of one label, but for those in which a label or
    an epoch ends.
    whole: iterating gives the micro-batches of all ranks, for somebody else to deal out.
    Iterating gives this rank's micro-batches in order, from `start_step`, without end.
    Raises ConfigError: a batch that cannot be shared out evenly, an empty train split.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        start_step: int = 0,
        bags: Sequence[Bags | None] | None = None,
        labels: Sequence[np.ndarray] | None = None,
        whole: bool = False,
    ) -> None:
        shares = world_size * accumulation
        if batch_size < 1 or batch_size % shares:
            next_above = max(1, -(-batch_size // shares)) * shares
            raise ConfigError(
                f"train.batch_size: {batch_size} samples cannot be shared evenly by {world_size} rank(s) x "
                f"{accumulation} accumulation step(s); use a multiple of {shares}, such as {next_above}"
            )
        if not sizes or min(sizes) < 1:
            raise ConfigError(f"data.tasks: every task needs training samples; the train splits have {list(sizes)}")
        self.sizes = tuple(int(n) for n in sizes)
        self.counts = _shares(self.sizes, temperature)
        self.seed, self.batch_size, self._labels = seed, batch_size, labels
        self.rank, self.world_size, self.accumulation, self.start_step = rank, world_size, accumulation, start_step
        self._whole = whole
        self._bags = list(bags or [None] * len(self.sizes))
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Draws of one epoch: samples of all train splits together."""
        return sum(self.sizes)

    def batch(self, step: int, micro: int = 0, rank: int | None = None) -> list[Draw]:
        """Micro-batch `micro` of step `step` on `rank` (default: this one): a contiguous slice of the global batch.

        The ranks' slices of one micro-batch stand side by side, so that together they are the same samples for any
        number of ranks: the router's losses, which are those of a micro-batch over all ranks, then are the same too.
        """
        share = self.batch_size // (self.world_size * self.accumulation)
        position = micro * self.world_size + (self.rank if rank is None else rank)
        start = step * self.batch_size + position * share
        return self.draws(start, start + share)

    def everyone(self, step: int, micro: int = 0) -> list[Draw]:
        """Micro-batch `micro` of step `step` of all ranks."""
        share = self.batch_size // self.accumulation
        start = step * self.batch_size + micro * share
        return self.draws(start, start + share)

    def draws(self, start: int, stop: int) -> list[Draw]:
        """Draws number `start` to `stop` since the start of training."""
        found = []
        while start < stop:
            epoch, index = divmod(start, self.samples_per_epoch)
            tasks, items = self._epoch(epoch)
            count = min(stop - start, self.samples_per_epoch - index)
            part = slice(index, index + count)
            pairs = zip(tasks[part].tolist(), items[part].tolist(), strict=True)
            found += [Draw(task, item, start + i) for i, (task, item) in enumerate(pairs)]
            start += count
        return found

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start_step
        while True:
            for micro in range(self.accumulation):
                yield self.everyone(step, micro) if self._whole else self.batch(step, micro)
            step += 1

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(E,) task and (E,) item of every draw of an epoch."""
        if epoch not in self._epochs:
            tasks = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.counts)
            items = np.concatenate([self._items(task, epoch) for task in range(len(self.sizes))])
            order = self._random(_EPOCH, epoch).permutation(self.samples_per_epoch)
            if any(bags is not None for bags in self._bags):
                order = _together(order, self._runs(items), len(order))
            if self._labels is not None:
                order = self._within(epoch, tasks, items, order, self._labels)
            if len(self._epochs) > 1:
                self._epochs.clear()
            self._epochs[epoch] = tasks[order], items[order]
        return self._epochs[epoch]

    def _within(
        self, epoch: int, tasks: np.ndarray, items: np.ndarray, order: np.ndarray, labels: Sequence[np.ndarray]
    ) -> np.ndarray:
        """`order` with the draws of a label together, cut where batches begin, and the batches mixed."""
        random, size = self._random(_WITHIN, epoch), self.batch_size
        label = np.empty(len(tasks), np.int64)
        for task, own in enumerate(labels):
            label[tasks == task] = own[items[tasks == task]]
        _, place = np.unique(label[order], return_inverse=True)
        order = order[np.argsort(random.permutation(int(place.max()) + 1)[place], kind="stable")]
        head = min(-(epoch * self.samples_per_epoch) % size, len(order))  # of the batch that the last epoch began
        whole = (len(order) - head) // size
        blocks = order[head : head + whole * size].reshape(whole, size)[random.permutation(whole)]
        return np.concatenate([order[:head], blocks.ravel(), order[head + whole * size :]])

    def _items(self, task: int, epoch: int) -> np.ndarray:
        """The items of a task that an epoch draws: its next `counts` places in the row of permutations."""
        size, count = self.sizes[task], self.counts[task]
        places = np.arange(epoch * count, (epoch + 1) * count)
        rounds = range(places[0] // size, places[-1] // size + 1)
        row = np.concatenate([self._permutation(task, number) for number in rounds])
        return row[places - rounds[0] * size]

    def _permutation(self, task: int, number: int) -> np.ndarray:
        key = (task, number)
        if key not in self._permutations:
            while len(self._permutations) > _KEPT * len(self.sizes):
                self._permutations.pop(next(iter(self._permutations)))
            order, bags = self._random(_TASK, task, number).permutation(self.sizes[task]), self._bags[task]
            self._permutations[key] = order if bags is None else _together(order, bags.bag, bags.together)
        return self._permutations[key]

    def _runs(self, items: np.ndarray) -> np.ndarray:
        """(E,) run of each draw of an epoch before it is mixed: neighbours of one bag, up to as many as are wanted."""
        starts = np.ones(len(items), bool)
        first = 0
        for bags, count in zip(self._bags, self.counts, strict=True):
            if bags is not None:
                bag = bags.bag[items[first : first + count]]
                starts[first : first + count] = _places(bag) % bags.together == 0
            first += count
        return starts.cumsum()

    def _random(self, *purpose: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed % 2**63, *purpose])))


def _together(order: np.ndarray, bag: np.ndarray, most: int) -> np.ndarray:
    """`order`, with the things of one bag, up to `most` of them, moved to where the first of them stands.

    order: (n,) a permutation. bag: (n,) int64 of each thing, by its number.
    """
    by_bag = np.argsort(bag[order], kind="stable")
    starts = _places(bag[order][by_bag]) % most == 0
    where = np.empty_like(by_bag)
    where[by_bag] = by_bag[starts][starts.cumsum() - 1]
    return order[np.argsort(where, kind="stable")]


def _places(value: np.ndarray) -> np.ndarray:
    """(n,) the number of each element in its stretch of equal ones."""
    begins = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
    return np.arange(len(value)) - np.repeat(begins, np.diff([*begins, len(value)]))


def _shares(sizes: Sequence[int], temperature: float) -> tuple[int, ...]:
    """How many of sum(sizes) draws each task gets, by n^(1/temperature), at least 1, rounded by largest remainder."""
    total = sum(sizes)
    weights = np.asarray(sizes, np.float64) ** (1.0 / temperature)
    exact = weights / weights.sum() * total
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    by_remainder = np.argsort(-(exact - counts), kind="stable")
    spare = total - int(counts.sum())
    counts[by_remainder[:spare]] += 1 if spare > 0 else 0
    while counts.sum() > total:
        counts[np.argmax(counts)] -= 1
    return tuple(counts.tolist())
