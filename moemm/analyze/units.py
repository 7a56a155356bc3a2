"""A unit of the comparison: one modality, or a pair, with the tasks that have it and some of their samples."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moemm.data import Packer, SplitDataset
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.sample import PackedBatch, Prepare, Sample
from moemm.errors import DataError
from moemm.modalities import ModalitySpec, prepare_functions


@dataclass(frozen=True, slots=True)
class Unit:
    """catalogue: the unit's modalities and tasks alone. train, val: batches of samples that have all its modalities.

    Targets of regressions have mean 0 and deviation 1 on the drawn samples of the train split.
    """

    name: str
    catalogue: Catalogue
    specs: dict[str, ModalitySpec]
    train: list[PackedBatch]
    val: list[PackedBatch]

    def targets(self, task: TaskInfo, split: str) -> torch.Tensor:
        """Targets of a task in the order of the batches of `train` or `val`."""
        return torch.cat([batch.targets[task.name] for batch in getattr(self, split)])


def make_unit(
    catalogue: Catalogue, specs: Mapping[str, ModalitySpec], modalities: Sequence[str], *, samples: int, seed: int
) -> Unit:
    """The unit of one or more modalities; up to `samples` samples of each task and split, drawn by `seed`.

    Raises DataError where no task has samples of train and val with all of them.
    """
    wanted = [task for task in catalogue.tasks if set(modalities) <= set(task.modalities)]
    found = {}
    for task in wanted:
        drawn = {split: draw(catalogue, task, split, modalities, samples, seed) for split in ("train", "val")}
        if all(drawn.values()):
            found[task.name] = drawn
    if not found:
        raise DataError(
            f"no task has samples with {' and '.join(modalities)} in both splits train and val: nothing to measure on\n"
            "  allowed: modalities that some sample of each of the two splits has\n"
            "  to do: mark samples of it for val, or leave it out with `modalities` of its task"
        )
    small = _only(catalogue, modalities, found)
    own = {info.name: specs[info.name] for info in small.modalities}
    train, val = (_batches(small, own, found, split, seed) for split in ("train", "val"))
    unit = Unit("+".join(modalities), small, own, train, val)
    _standardise(unit)
    return unit


def draw(
    catalogue: Catalogue, task: TaskInfo, split: str, need: Collection[str], limit: int, seed: int
) -> list[Sample]:
    """Up to `limit` samples of a split that have all modalities of `need`, the same for the same seed."""
    dataset = SplitDataset(catalogue, task=task.name, split=split)
    stored = dict(zip(task.modalities, task.stored or task.modalities, strict=True))
    present = np.all([dataset.file.present(stored[name])[dataset.indices] for name in need], axis=0)
    items = np.random.default_rng(seed).permutation(np.flatnonzero(present))[:limit]
    return [dataset[int(item)] for item in items]


def pack(
    catalogue: Catalogue, specs: Mapping[str, ModalitySpec], samples: Sequence[Sample], *, size: int
) -> list[PackedBatch]:
    """The samples in batches of `size`, in order."""
    prepare: Prepare = prepare_functions(specs)
    packer = Packer(catalogue, prepare)
    return [packer(samples[start : start + size]) for start in range(0, len(samples), size)]


def _only(catalogue: Catalogue, modalities: Sequence[str], tasks: Collection[str]) -> Catalogue:
    kept = []
    for task in catalogue.tasks:
        if task.name in tasks:
            stored = dict(zip(task.modalities, task.stored or task.modalities, strict=True))
            own = tuple(stored[name] for name in modalities)
            kept.append(replace(task, modalities=tuple(modalities), stored=own, drawn_with=None))
    infos = tuple(info for info in catalogue.modalities if info.name in modalities)
    return Catalogue(tasks=tuple(kept), modalities=infos)


def _batches(
    small: Catalogue,
    specs: Mapping[str, ModalitySpec],
    found: Mapping[str, Mapping[str, list[Sample]]],
    split: str,
    seed: int,
) -> list[PackedBatch]:
    """Batches of 32 in which the tasks are mixed."""
    keep = {info.name for info in small.modalities}
    samples = [
        Sample(s.task, s.index, {name: value for name, value in s.modalities.items() if name in keep}, s.target)
        for drawn in found.values()
        for s in drawn[split]
    ]
    order = np.random.default_rng(seed).permutation(len(samples))
    return pack(small, specs, [samples[number] for number in order], size=32)


def _standardise(unit: Unit) -> None:
    for task in unit.catalogue.tasks:
        if task.target != "regression":
            continue
        values = unit.targets(task, "train")
        mean, deviation = values.mean(0), values.std(0).nan_to_num(1.0).clamp_min(1e-6)
        for batch in (*unit.train, *unit.val):
            batch.targets[task.name] = (batch.targets[task.name] - mean) / deviation
