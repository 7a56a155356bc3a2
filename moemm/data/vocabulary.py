"""Text -> ids: words, subwords (byte-pair encoding) or bytes, fitted on the train split, stored as plain JSON.

Ids 0-255 are the bytes; words and subwords come after them. What the vocabulary lacks is spelled in bytes, so
no text is ever lost or refused.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Literal, cast

import numpy as np

NUM_BYTES = 256
WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
Mode = Literal["word", "subword", "bytes"]


def words_of(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return WORD.findall(text.lower())


def fit_words(texts: Iterable[str], *, size: int, min_count: int = 2) -> list[str]:
    """The most frequent words that occur at least `min_count` times, most frequent first, ties by spelling."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(words_of(text))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in ranked if count >= min_count][: max(size - NUM_BYTES, 0)]


def fit_subwords(texts: Iterable[str], *, size: int) -> list[list[int]]:
    """Merges of byte-pair encoding (arXiv:1508.07909), [left id, right id] in order; merge i makes id 256 + i."""
    counts = Counter(word for text in texts for word in words_of(text))
    words = [list(word.encode()) for word in counts]
    weight = list(counts.values())
    pairs: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        _count(word, number, weight[number], pairs, where)
    merges: list[list[int]] = []
    while len(merges) < size - NUM_BYTES and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        if pairs[best] < 2:
            break
        new = NUM_BYTES + len(merges)
        merges.append(list(best))
        for number in sorted(where[best]):
            _count(words[number], number, -weight[number], pairs, where)
            words[number] = _merge(words[number], best, new)
            _count(words[number], number, weight[number], pairs, where)
        pairs.pop(best, None)
    return merges


class Vocabulary:
    """Text -> (T,) int32 ids. `entries`: words, merges, or nothing for bytes."""

    def __init__(self, mode: Mode, entries: list[str] | list[list[int]], *, max_tokens: int):
        self.mode, self.max_tokens = mode, max_tokens
        self.size = NUM_BYTES + len(entries)
        self._words = {cast(str, word): NUM_BYTES + i for i, word in enumerate(entries)} if mode == "word" else {}
        merges = cast(list[list[int]], entries) if mode == "subword" else []
        self._ranks = {(left, right): i for i, (left, right) in enumerate(merges)}
        self._subwords = lru_cache(maxsize=65536)(self._split)

    def __call__(self, text: str) -> np.ndarray:
        """Ids of a text, cut at `max_tokens`. A text of nothing but spaces gives one space, never no token."""
        if self.mode == "bytes":
            ids = list(text.encode())
        elif self.mode == "word":
            ids = [i for word in words_of(text) for i in self._word(word)]
        else:
            ids = [i for word in words_of(text) for i in self._subwords(word)]
        return np.asarray((ids or [ord(" ")])[: self.max_tokens], dtype=np.int32)

    def __reduce__(self) -> tuple[object, ...]:
        entries: object = list(self._words) if self.mode == "word" else [list(pair) for pair in self._ranks]
        return _rebuild, (self.mode, entries, self.max_tokens)

    def _word(self, word: str) -> list[int]:
        known = self._words.get(word)
        return list(word.encode()) if known is None else [known]

    def _split(self, word: str) -> list[int]:
        """Apply the merges to a word, the earliest learned first."""
        ids = list(word.encode())
        while len(ids) > 1:
            pairs = list(pairwise(ids))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            ids = _merge(ids, best, NUM_BYTES + self._ranks[best])
        return ids


def _rebuild(mode: Mode, entries: list[str] | list[list[int]], max_tokens: int) -> Vocabulary:
    return Vocabulary(mode, entries, max_tokens=max_tokens)


def _count(
    word: list[int],
    number: int,
    weight: int,
    pairs: Counter[tuple[int, int]],
    where: defaultdict[tuple[int, int], set[int]],
) -> None:
    """Add a word's pairs to the counts, or take them away where `weight` is negative."""
    for pair in pairwise(word):
        pairs[pair] += weight
        if pairs[pair] <= 0:
            del pairs[pair]
        if weight > 0:
            where[pair].add(number)


def _merge(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace every occurrence of the pair, from the left."""
    out: list[int] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] = new
        else:
            out.append(symbol)
    return out
