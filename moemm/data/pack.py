"""Samples to one PackedBatch: rows of a modality joined, none padded, every modality and task there even if empty.

B samples of the batch, M modalities of the catalogue, n rows of one modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moemm.data.catalogue import Catalogue, ModalityInfo, TaskInfo
from moemm.data.sample import PackedBatch, PackedModality, Prepare, Sample, Table, Value
from moemm.data.shared import no_modality, numbered
from moemm.errors import DataError


class Packer:
    """Packs lists of samples. Picklable where `prepare` is.

    prepare: modality name -> function run on each value (text -> ids). Text without one becomes its UTF-8 bytes. Ids
    are ragged int64; for arrays, the type and the shape of a row must stay as the catalogue has them.
    """

    def __init__(self, catalogue: Catalogue, prepare: Prepare | None = None) -> None:
        self._catalogue = catalogue
        self._prepare: Prepare = dict(prepare or {})
        self._positions = {task.name: i for i, task in enumerate(catalogue.tasks)}

    def __call__(self, samples: Sequence[Sample]) -> PackedBatch:
        """A batch of B samples in their order. DataError: a sample without any modality, a value of another shape."""
        presence = torch.zeros(len(samples), len(self._catalogue.modalities), dtype=torch.bool)
        packed = {}
        for column, info in enumerate(self._catalogue.modalities):
            rows = [(i, self._value(info, s)) for i, s in enumerate(samples) if info.name in s.modalities]
            filled = [(i, value) for i, value in rows if not _is_empty(value)]
            packed[info.name] = _pack(info, [value for _, value in filled], [i for i, _ in filled], samples)
            presence[packed[info.name].sample, column] = True
        self._check_presence(samples, presence)
        return PackedBatch(
            modalities=packed,
            presence=presence,
            task=torch.tensor([self._positions[s.task] for s in samples], dtype=torch.int64),
            index=torch.tensor([s.index for s in samples], dtype=torch.int64),
            bag=torch.tensor([self._bag(s) for s in samples], dtype=torch.int64),
            targets={task.name: _targets(task, samples) for task in self._catalogue.tasks},
        )

    def _bag(self, sample: Sample) -> int:
        """That of the sample, or a negative number that no other sample has."""
        return -1 - numbered(self._positions[sample.task], sample.index) if sample.bag is None else sample.bag

    def _value(self, info: ModalityInfo, sample: Sample) -> Any:
        value = sample.modalities[info.name]
        prepare = self._prepare.get(info.name)
        if prepare is not None:
            value = prepare(value)
        elif isinstance(value, str):
            value = np.frombuffer(value.encode(), np.uint8)
        return value

    def _check_presence(self, samples: Sequence[Sample], presence: torch.Tensor) -> None:
        lacking = (~presence.any(dim=1)).nonzero().flatten().tolist()
        if lacking:
            sample = samples[lacking[0]]
            task = self._catalogue.tasks[self._positions[sample.task]]
            raise no_modality(task, [samples[i].index for i in lacking])


def _is_empty(value: Any) -> bool:
    return not isinstance(value, Table) and np.ndim(value) > 0 and len(value) == 0


def _pack(info: ModalityInfo, values: list[Value], rows: list[int], samples: Sequence[Sample]) -> PackedModality:
    sample = torch.tensor(rows, dtype=torch.int64)
    try:
        if info.kind == "tabular":
            return PackedModality(_tables(info, values), None, sample)
        if not info.ragged:
            return PackedModality({"data": _join(info, values, np.stack)}, None, sample)
        lengths = torch.tensor([len(value) for value in values], dtype=torch.int64)
        return PackedModality({"data": _join(info, values, np.concatenate)}, lengths, sample)
    except (ValueError, TypeError) as error:
        named = ", ".join(f"{samples[i].task} {samples[i].index}" for i in rows[:5])
        raise DataError(
            f"modality {info.name} ({info.kind}): {error}; in a batch with the samples {named}\n"
            f"  allowed: {'ragged ' if info.ragged else ''}values of shape {info.shape}, {info.dtype}\n"
            "  to do: check the file with `moemm data validate`, and what `prepare` does to this modality"
        ) from None


def _join(info: ModalityInfo, values: list[Any], join: Any) -> torch.Tensor:
    dtype = np.dtype(np.int64 if info.dtype == "text" else info.dtype)
    if not values:
        return torch.from_numpy(np.zeros((0, *info.shape), dtype))
    if info.dtype == "text":
        values = [np.asarray(value, np.int64) for value in values]
    for value in values:
        shape = value.shape[1:] if info.ragged else value.shape
        if value.dtype != dtype or shape != info.shape:
            raise ValueError(f"a value of shape {value.shape}, {value.dtype}")
    return torch.from_numpy(np.ascontiguousarray(join(values)))


def _tables(info: ModalityInfo, values: list[Any]) -> dict[str, torch.Tensor]:
    num = np.stack([v.num for v in values]) if values else np.zeros((0, len(info.num_names)), np.float32)
    cat = np.stack([v.cat for v in values]) if values else np.zeros((0, len(info.cat_names)), np.int32)
    return {"num": torch.from_numpy(num), "cat": torch.from_numpy(cat)}


def _targets(task: TaskInfo, samples: Sequence[Sample]) -> torch.Tensor:
    values = []
    for sample in samples:
        if sample.task == task.name:
            values.append(sample.target)
        elif task.name in sample.others:
            values.append(sample.others[task.name])
    if task.target == "classification":
        return torch.tensor(values, dtype=torch.int64)
    if not values:
        return torch.zeros(target_shape(task, 0), dtype=torch.float32)
    return torch.from_numpy(np.asarray(values, np.float32))


def target_shape(task: TaskInfo, num_samples: int) -> tuple[int, ...]:
    """Shape of the targets of `num_samples` samples: (n,), or (n, C) for multilabel and for vectors."""
    flat = task.target == "classification" or (task.target == "regression" and task.outputs == 1)
    return (num_samples,) if flat else (num_samples, task.outputs)
