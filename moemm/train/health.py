"""Stop before something broken is applied or saved, and say where it came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch, rows_of
from moemm.distributed import gather_objects
from moemm.errors import HealthError
from moemm.models import ModelOutput

_SHOWN = 8


def refuse_loss(
    step: int, broken: list[str], tasks: Sequence[TaskInfo], output: ModelOutput, batch: PackedBatch
) -> None:
    """Raise on all ranks (all must call it) the HealthError of a loss that is not finite.

    step: 0-based; broken: this rank's tasks with such a loss, as MicroLoss.broken gives them.
    """
    infinite = infinite_inputs(batch, tasks) if broken else []
    # One infinite value may reach every sample of a batch: where there is one, the outputs tell nothing more.
    lines = infinite or [_line(name, tasks, output, batch) for name in broken]
    found = enumerate(gather_objects((broken, lines)))
    shown = "\n".join(
        f"  rank {rank}, {', '.join(names)}: {line}" for rank, (names, rows) in found for line in rows[:_SHOWN]
    )
    raise HealthError(
        f"The loss of step {step + 1} is not finite:\n{shown}\nNothing of this step was applied or saved. Look at "
        "these samples (moemm data validate FILE); if they are fine, lower train.lr or raise train.warmup, and go on "
        "from the last checkpoint with --resume."
    )


def infinite_inputs(batch: PackedBatch, tasks: Sequence[TaskInfo]) -> list[str]:
    """Which samples hold an infinite value, and in which modality. NaN is no fault: it stands for a missing value."""
    found = []
    for name, packed in batch.modalities.items():
        for values in packed.fields.values():
            if not values.is_floating_point() or not values.numel():
                continue
            rows = torch.isinf(values).reshape(len(values), -1).any(-1).nonzero().flatten()
            if packed.lengths is not None:
                rows = torch.searchsorted(packed.lengths.cumsum(0), rows, right=True)
            for position in packed.sample[rows].unique().tolist():
                sample = f"sample {int(batch.index[position])} of task {tasks[int(batch.task[position])].name}"
                found.append(f"{sample} has an infinite value in modality {name}")
    return found


def _line(name: str, tasks: Sequence[TaskInfo], output: ModelOutput, batch: PackedBatch) -> str:
    if name not in [task.name for task in tasks]:
        return "the router's loss" if name == "router" else f"the {name}"
    return f"task {name}, {_ids(_suspects(name, tasks, output, batch))}"


def _suspects(name: str, tasks: Sequence[TaskInfo], output: ModelOutput, batch: PackedBatch) -> list[int]:
    """Positions in the task's file of the samples with an output or a target that is not finite; all if none has."""
    number = [task.name for task in tasks].index(name)
    index_n = batch.index[rows_of(batch.task, tasks, number)]
    target = batch.targets[name]
    fine_n = torch.isfinite(output.outputs[name]).all(-1)
    fine_n &= torch.isfinite(target.float()).reshape(len(target), -1).all(-1)
    suspects: list[int] = index_n[~fine_n.to(index_n.device)].tolist()
    return suspects or index_n.tolist()


def _ids(suspects: list[int]) -> str:
    more = f" and {len(suspects) - _SHOWN} more" if len(suspects) > _SHOWN else ""
    return f"samples {', '.join(map(str, suspects[:_SHOWN]))}{more} of its file"


def refuse_gradient(step: int, norm: float) -> None:
    """Raise the HealthError of a gradient that is not finite though the loss is."""
    raise HealthError(
        f"The gradient of step {step + 1} has the norm {norm}. Nothing of this step was applied or saved. Lower "
        "train.lr, raise train.warmup, or train in fp32 (train.precision), and go on from the last checkpoint with "
        "--resume."
    )
