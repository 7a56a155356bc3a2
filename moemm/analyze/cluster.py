"""Agglomerative clustering with average linkage: who is joined first, and the groups that a number of them gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Merge:
    """Two groups that become one. height: their mean distance."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    height: float


def agglomerate(names: Sequence[str], distance: np.ndarray) -> list[Merge]:
    """Merges from len(names) groups to one, nearest first. distance: (M, M), symmetric, 0 on the diagonal, bits.

    Raises ValueError where it is not.
    """
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if len(names) < 2:
        return []
    groups: list[tuple[str, ...]] = [(name,) for name in names]
    merges = []
    for left, right, height, _ in linkage(squareform(distance, checks=True), "average"):
        pair = sorted((groups[int(left)], groups[int(right)]), key=lambda group: names.index(group[0]))
        merges.append(Merge(pair[0], pair[1], float(height)))
        groups.append(tuple(sorted(pair[0] + pair[1], key=names.index)))
    return merges


def cut(names: Sequence[str], merges: Sequence[Merge], number: int) -> list[tuple[str, ...]]:
    """The `number` groups that are left when the first merges are done; groups and members in the order of `names`.

    number: from 1 to len(names).
    """
    groups: set[tuple[str, ...]] = {(name,) for name in names}
    for merge in merges[: len(names) - number]:
        groups -= {merge.left, merge.right}
        groups.add(tuple(sorted(merge.left + merge.right, key=names.index)))
    return sorted(groups, key=lambda group: names.index(group[0]))


def largest_jump(merges: Sequence[Merge]) -> int:
    """The number of groups before the merge whose height is farthest above the one before it; 1 without merges."""
    heights = [0.0, *(merge.height for merge in merges)]
    jumps = np.diff(heights)
    return 1 if not jumps.size else len(merges) + 1 - int(jumps.argmax())
