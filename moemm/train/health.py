"""Where a loss that is not finite came from: samples, modalities, tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch, rows_of
from moemm.models import ModelOutput

SHOWN = 8
Named = tuple[str, int]
"""A sample: its task, and its place in the task's file."""


@dataclass(slots=True)
class Finding:
    """What one rank knows of a loss that is not finite.

    broken: which losses, as MicroLoss.broken gives them. lines: for people. samples: those to look at.
    modalities: with an infinite value. tasks: whose loss is not finite though all their outputs are.
    """

    broken: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    samples: list[Named] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)


def find(broken: list[str], tasks: Sequence[TaskInfo], output: ModelOutput, batch: PackedBatch) -> Finding:
    """Look for the origin in this rank's micro-batch; nothing is found where none of its losses is broken."""
    finding = Finding(broken)
    if not broken:
        return finding
    for name, samples in infinite_inputs(batch, tasks).items():
        finding.modalities.append(name)
        finding.samples += samples
        finding.lines += [f"sample {i} of task {task} has an infinite value in modality {name}" for task, i in samples]
    # One infinite value may reach every sample of a batch: where there is one, the outputs tell nothing more.
    if not finding.lines:
        for name in broken:
            _look_at_outputs(finding, name, tasks, output, batch)
    return finding


def infinite_inputs(batch: PackedBatch, tasks: Sequence[TaskInfo]) -> dict[str, list[Named]]:
    """Modality -> samples with an infinite value in it. NaN is no fault: it stands for a missing value."""
    found: dict[str, list[Named]] = {}
    for name, packed in batch.modalities.items():
        for values in packed.fields.values():
            if not values.is_floating_point() or not values.numel():
                continue
            rows = torch.isinf(values).reshape(len(values), -1).any(-1).nonzero().flatten()
            if packed.lengths is not None:
                rows = torch.searchsorted(packed.lengths.cumsum(0), rows, right=True)
            places = packed.sample[rows].unique()
            if len(places):
                found.setdefault(name, []).extend(named(batch, tasks, places))
    return found


def named(batch: PackedBatch, tasks: Sequence[TaskInfo], places: torch.Tensor) -> list[Named]:
    """The samples at these places of a batch; places: int64 positions, or (B,) bool."""
    pairs = zip(batch.task[places].tolist(), batch.index[places].tolist(), strict=True)
    return [(tasks[task].name, index) for task, index in pairs]


def _look_at_outputs(
    finding: Finding, name: str, tasks: Sequence[TaskInfo], output: ModelOutput, batch: PackedBatch
) -> None:
    if name not in [task.name for task in tasks]:
        finding.lines.append("the router's loss" if name == "router" else f"the {name}")
        return
    number = [task.name for task in tasks].index(name)
    index_n = batch.index[rows_of(batch.task, tasks, number)]
    target = batch.targets[name]
    fine_n = torch.isfinite(output.outputs[name]).all(-1)
    if bool(fine_n.all()):
        finding.tasks.append(name)
    fine_n = fine_n & torch.isfinite(target.float()).reshape(len(target), -1).all(-1)
    suspects: list[int] = index_n[~fine_n.to(index_n.device)].tolist() or index_n.tolist()
    finding.samples += [(name, index) for index in suspects]
    finding.lines.append(f"task {name}, {_ids(suspects)}")


def _ids(suspects: list[int]) -> str:
    more = f" and {len(suspects) - SHOWN} more" if len(suspects) > SHOWN else ""
    return f"samples {', '.join(map(str, suspects[:SHOWN]))}{more} of its file"
