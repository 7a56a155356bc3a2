"""Who gets which samples of a micro-batch: dealt over the ranks so that each has about as much to compute.

The samples of a micro-batch over all ranks are the same for any number of ranks and for any way of dealing them. How
many tokens a sample has is known from the lengths that its file stores, without reading it. All of it is whole numbers,
so that ranks on different machines come to the same result to the bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moemm.data.dataset import SplitDataset
from moemm.data.sample import Prepare
from moemm.errors import DataError

UNIT = 1024
"""Parts of a token that counts are kept in."""


class TokenCount(NamedTuple):
    """Tokens of a modality, in parts of UNIT: `fixed` + `each` x its stored length; `absent` where there is none.

    The stored length is that of DataFile.lengths: rows of a ragged array, bytes of a text, 1 for others. prepared: that
    of what `prepare` makes of a text, since the same number of bytes may be few words or many.
    """

    fixed: int
    each: int
    absent: int = 0
    prepared: bool = False


@dataclass(frozen=True, slots=True)
class Dealt:
    """How micro-batches are dealt over `ranks`, and the rank that is meant.

    counts: tokens of each modality; even: tokens of a sample whose attention costs as much as all else.
    """

    counts: Mapping[str, TokenCount]
    even: int
    rank: int = 0
    ranks: int = 1


def stored_name(dataset: SplitDataset, name: str) -> str:
    """The name in its file of a modality of the run."""
    return (dataset.task.stored or dataset.task.modalities)[dataset.task.modalities.index(name)]


def is_text(dataset: SplitDataset, name: str) -> bool:
    """Whether a modality is stored as text."""
    return dataset.file.layout.modalities[stored_name(dataset, name)].form == "text"


def lengths_of(dataset: SplitDataset, name: str, prepare: Prepare, items: np.ndarray | None = None) -> np.ndarray:
    """(n,) int64 lengths of a modality of all items of a split, or of some. prepare: of texts, or {}: see TokenCount.

    A text that cannot be read has the length of its bytes: it is for the loader to say what is wrong.
    """
    stored, indices = stored_name(dataset, name), dataset.indices if items is None else dataset.indices[items]
    lengths = np.asarray(dataset.file.lengths(stored)[indices], np.int64)
    function = prepare.get(name)
    if function is None or not is_text(dataset, name):
        return lengths
    lengths = lengths.copy()
    for place, index in enumerate(indices.tolist()):
        if lengths[place]:
            with suppress(DataError):
                lengths[place] = len(function(dataset.file.read(stored, index)))  # type: ignore[arg-type]
    return lengths


class Lengths:
    """Of all items of a split: tokens of each of its modalities, in parts of UNIT. prepare: of texts."""

    def __init__(self, dataset: SplitDataset, counts: Mapping[str, TokenCount], prepare: Prepare) -> None:
        names = dataset.task.modalities
        own = [counts[name] for name in names]
        lengths = [lengths_of(dataset, name, prepare if counts[name].prepared else {}) for name in names]
        tokens = [count.fixed + count.each * length for count, length in zip(own, lengths, strict=True)]
        self._tokens_nM = np.maximum(np.stack(tokens, axis=1), UNIT)
        present = [dataset.file.present(stored_name(dataset, name))[dataset.indices] for name in names]
        self._here_nM = np.stack(present, axis=1)
        self._absent_M = np.array([count.absent for count in own], np.int64)
        self._tokens_n: list[int] = np.where(self._here_nM, self._tokens_nM, self._absent_M).sum(1).tolist()
        self._num_n: list[int] = self._here_nM.sum(1).tolist()

    def tokens(self, item: int, goes: np.ndarray | None) -> int:
        """Tokens of an item, in parts of UNIT. goes: which of the modalities that it has are taken away; None: none."""
        if goes is None or not goes.any():
            return self._tokens_n[item]
        here_M = self._here_nM[item].copy()
        here_M[np.flatnonzero(here_M)[goes]] = False
        return int(np.where(here_M, self._tokens_nM[item], self._absent_M).sum())

    def num_modalities(self, item: int) -> int:
        """How many modalities an item has."""
        return self._num_n[item]


def cost(tokens: int, *, even: int) -> int:
    """What a sample of so many tokens (in parts of UNIT) costs, in the same parts, as tokens of a short sample.

    even: tokens of a sample whose attention costs as much as all else; its share grows with the length.
    """
    return tokens + tokens * tokens // (even * UNIT)


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """The positions that each rank gets, rising: the dearest first, each to the rank that has least so far.

    The largest sum is at most 4/3 of the best possible (Graham 1969). Ranks that are level take turns by number.
    """
    heap = [(0, 0, rank) for rank in range(ranks)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for position in sorted(range(len(costs)), key=lambda one: (-costs[one], one)):
        total, number, rank = heapq.heappop(heap)
        shares[rank].append(position)
        heapq.heappush(heap, (total + costs[position], number + 1, rank))
    return [sorted(share) for share in shares]


class TokenDeal:
    """Deals micro-batches of all ranks out to one. lengths: of each group's items; even: see `cost`."""

    def __init__(self, lengths: Sequence[Lengths], *, even: int, rank: int, ranks: int) -> None:
        self._lengths, self._even, self._rank, self._ranks = lengths, even, rank, ranks

    def share(self, draws: Sequence[tuple[int, int, np.ndarray | None]]) -> list[int]:
        """Positions of this rank's draws. draws: of each its group, its item, and which modalities go."""
        costs = [cost(self._lengths[group].tokens(item, goes), even=self._even) for group, item, goes in draws]
        return deal(costs, self._ranks)[self._rank]

    def num_modalities(self, group: int, item: int) -> int:
        """How many modalities an item of a group has."""
        return self._lengths[group].num_modalities(item)
