"""Which training samples have a label that may be used: all, or a share of each class drawn by the seed."""

from __future__ import annotations

import zlib

import numpy as np

from moemm.data.catalogue import Catalogue
from moemm.data.dataset import SplitDataset

_LABELS = 3  # what a random stream is for; 0 to 2 are the sampler's and the loader's


def labelled_items(catalogue: Catalogue, *, share: float, seed: int) -> list[np.ndarray]:
    """For each task the items of its train split, ascending, whose labels are used; at least one of each class.

    Drawn by seed and the task's name, so that other tasks and their order change nothing; what a smaller share has, a
    larger one has too. Regression and multilabel tasks are not stratified.
    """
    return [_draw(SplitDataset(catalogue, task=t.name, split="train"), share, seed) for t in catalogue.tasks]


def _draw(dataset: SplitDataset, share: float, seed: int) -> np.ndarray:
    targets = dataset.targets
    name = zlib.crc32(dataset.task.name.encode())
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _LABELS, name]))).permutation(
        len(targets)
    )
    classes = targets[order] if dataset.task.target == "classification" else np.zeros(len(order), np.int64)
    chosen = [order[classes == one] for one in np.unique(classes)]
    return np.sort(np.concatenate([items[: max(1, round(share * len(items)))] for items in chosen]))
