"""How often each class occurs in each split."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moemm.data.catalogue import SPLITS
from moemm.data.file import LabelInfo
from moemm.data.limits import printable


def unseen_classes(label: LabelInfo, targets: np.ndarray, split: np.ndarray) -> str:
    """Classes of val and test that train lacks, with their counts: 'dog (2 in test)'. Empty where all is well."""
    if label.target == "regression":
        return ""
    counts = class_counts(targets, split, outputs=label.outputs)
    found = []
    for number in np.flatnonzero((counts[0] == 0) & (counts[1] + counts[2] > 0)):
        where = ", ".join(f"{counts[SPLITS[s]][number]} in {s}" for s in ("val", "test") if counts[SPLITS[s]][number])
        found.append(f"{printable(class_name(label.class_names, int(number)))} ({where})")
    return ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")


def class_name(names: Sequence[str], number: int) -> str:
    """The name of a class, 'class 3' where it has none."""
    return names[number] if number < len(names) else f"class {number}"


def class_counts(targets: np.ndarray, split: np.ndarray, *, outputs: int) -> np.ndarray:
    """(splits, C) int64: samples of each class in each split; for multilabel targets, samples that have the label."""
    counts = np.zeros((len(SPLITS), outputs), np.int64)
    for number in SPLITS.values():
        part = targets[split == number]
        if part.ndim == 1 and part.dtype == np.int64:
            counts[number] = np.bincount(part, minlength=outputs)
        elif part.ndim == 2:
            counts[number] = (part > 0).sum(axis=0)
    return counts
