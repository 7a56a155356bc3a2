"""A batch without some of its parts. B samples of the batch, n rows of one modality."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch, PackedModality, rows_of


def leave_out(
    batch: PackedBatch, all_tasks: Sequence[TaskInfo], *, modalities: Collection[str] = (), tasks: Collection[str] = ()
) -> PackedBatch:
    """`batch` as if these modalities had been absent, and samples of these tasks had not been drawn.

    A sample that has nothing left is left out, too; the batch may have no sample then. all_tasks: of the catalogue.
    """
    keep_B = torch.ones_like(batch.task, dtype=torch.bool)
    rows = [rows_of(batch.task, all_tasks, number) for number in range(len(all_tasks))]
    for task, rows_B in zip(all_tasks, rows, strict=True):
        if task.name in tasks:
            keep_B &= ~rows_B
    presence = batch.presence.clone()
    for column, name in enumerate(batch.modalities):
        if name in modalities:
            presence[:, column] = False
    keep_B &= presence.any(1)
    return PackedBatch(
        modalities={name: _kept(one, keep_B, name not in modalities) for name, one in batch.modalities.items()},
        presence=presence[keep_B],
        task=batch.task[keep_B],
        index=batch.index[keep_B],
        bag=batch.bag[keep_B],
        targets={
            task.name: batch.targets[task.name][keep_B[rows_B]] for task, rows_B in zip(all_tasks, rows, strict=True)
        },
    )


def _kept(packed: PackedModality, keep_B: torch.Tensor, wanted: bool) -> PackedModality:
    keep_n = keep_B[packed.sample] if wanted else torch.zeros_like(packed.sample, dtype=torch.bool)
    place_B = keep_B.cumsum(0) - 1
    rows = keep_n if packed.lengths is None else torch.repeat_interleave(keep_n, packed.lengths)
    return PackedModality(
        {name: values[rows] for name, values in packed.fields.items()},
        None if packed.lengths is None else packed.lengths[keep_n],
        place_B[packed.sample[keep_n]],
    )
