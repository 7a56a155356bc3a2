"""One micro-batch: the objective of the *global* batch, and what is counted on the way. T tasks.

Every sample of a step counts the same (times its task's weight), on whichever rank and in whichever micro-batch it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from moemm.config import Config
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.distributed import World, sum_over_ranks
from moemm.models import ModelOutput
from moemm.moe import router_loss
from moemm.objectives import supervised_losses


@dataclass(slots=True)
class MicroLoss:
    """Losses of one micro-batch on this rank.

    backward: what the engine gets; averaged over ranks and micro-batches its gradient is that of the objective.
    sums_T: per task the sum over the samples, without the task's weight. router: of the micro-batch of all ranks.
    missing: of the regression of absent modalities, sum over the samples, times its weight.
    """

    backward: torch.Tensor
    sums_T: torch.Tensor
    router: torch.Tensor
    missing: torch.Tensor

    def broken(self, names: tuple[str, ...]) -> list[str]:
        """Names of the tasks whose loss is not finite, and `router` and `missing` if those are not."""
        finite = torch.isfinite(torch.cat([self.sums_T, torch.stack([self.router, self.missing])])).tolist()
        return [name for name, fine in zip((*names, "router", "missing"), finite, strict=True) if not fine]


class Objective:
    """Supervised losses + router losses, scaled for the engine.

    allowed_LME: which modality may use which routed expert; None for a model without a router.
    """

    def __init__(
        self, tasks: tuple[TaskInfo, ...], config: Config, world: World, allowed_LME: torch.Tensor | None
    ) -> None:
        self.tasks, self._world, self._allowed_LME = tasks, world, allowed_LME
        self._router_losses, self._smoothing = config.model.router.losses, config.train.label_smoothing
        self._missing_weight = config.model.missing.weight or 1.0
        # The engine divides by ranks x micro-batches; the samples of the step are batch_size.
        self._scale = world.size * config.train.accumulation / config.train.batch_size
        self._weights_T = torch.tensor([task.weight for task in tasks], device=world.device)

    def __call__(self, output: ModelOutput, batch: PackedBatch) -> MicroLoss:
        """Losses of one micro-batch; every rank calls it together (the router's statistics are summed over ranks)."""
        every = [self._sums(outputs, batch) for outputs in (output.outputs, *output.earlier)]
        sums_T, mean_T = every[0], torch.stack(every).mean(0) if output.earlier else every[0]
        router = self._router(output) if output.router is not None else sums_T.new_zeros(())
        missing = sums_T.new_zeros(()) if output.missing is None else self._missing_weight * output.missing
        backward = self._scale * ((self._weights_T * mean_T).sum() + missing) + router
        return MicroLoss(backward, sums_T.detach(), router.detach(), missing.detach())

    def _sums(self, outputs: Mapping[str, torch.Tensor], batch: PackedBatch) -> torch.Tensor:
        """(T,) sums over the samples of each task."""
        losses = supervised_losses(outputs, batch.targets, self.tasks, label_smoothing=self._smoothing)
        return torch.stack([losses[task.name] for task in self.tasks])

    def _router(self, output: ModelOutput) -> torch.Tensor:
        assert output.router is not None and self._allowed_LME is not None
        return router_loss(
            output.router,
            allowed_LME=self._allowed_LME,
            config=self._router_losses,
            reduce=sum_over_ranks,
            world_size=self._world.size,
        )


@dataclass(slots=True)
class WindowMeans:
    """Means over a window and all ranks; see observe.records.Metrics."""

    loss: float
    router_loss: float
    missing_loss: float
    losses: dict[str, float]
    accuracy: dict[str, float]
    tokens: int
    load_LME: np.ndarray | None


class Window:
    """Counts since the last report, on this rank; no synchronisation until `take`."""

    def __init__(self, tasks: tuple[TaskInfo, ...], config: Config, world: World, *, num_modalities: int) -> None:
        self._tasks, self._batch_size, self._world = tasks, config.train.batch_size, world
        self._num_modalities = num_modalities
        self._accumulation = config.train.accumulation
        self._weights = [task.weight for task in tasks]
        self._clear()

    def _clear(self) -> None:
        # Columns: sum of losses, samples, samples that were right.
        self._counts_TC = torch.zeros(len(self._tasks), 3, dtype=torch.float64, device=self._world.device)
        self._rest = torch.zeros(3, dtype=torch.float64, device=self._world.device)  # router, missing, tokens
        self._load_LME: torch.Tensor | None = None
        self._micros = 0

    def add(self, loss: MicroLoss, output: ModelOutput, targets: Mapping[str, torch.Tensor]) -> None:
        """Count one micro-batch."""
        self._micros += 1
        self._counts_TC[:, 0] += loss.sums_T
        self._rest[0] += loss.router
        self._rest[1] += loss.missing
        self._rest[2] += output.num_tokens
        for row, task in zip(self._counts_TC, self._tasks, strict=True):
            row[1] += len(targets[task.name])
            if task.target == "classification":
                row[2] += (output.outputs[task.name].argmax(-1) == targets[task.name]).sum()
        if output.router is not None:
            load_LME = output.router.load_LME.detach().unflatten(1, (self._num_modalities, -1)).sum(2)
            self._load_LME = load_LME if self._load_LME is None else self._load_LME + load_LME

    def take(self) -> WindowMeans:
        """The means, over all ranks (all call it together); then begin anew."""
        counts = sum_over_ranks(self._counts_TC).tolist()
        router, missing, tokens = sum_over_ranks(self._rest).tolist()
        load_LME = None if self._load_LME is None else _shares(sum_over_ranks(self._load_LME))
        steps = self._micros / self._accumulation
        router /= self._micros * self._world.size
        missing /= steps * self._batch_size
        objective = sum(weight * row[0] for weight, row in zip(self._weights, counts, strict=True))
        named = [(task, row) for task, row in zip(self._tasks, counts, strict=True) if row[1]]
        means = WindowMeans(
            loss=objective / (steps * self._batch_size) + router + missing,
            router_loss=router,
            missing_loss=missing,
            losses={task.name: row[0] / row[1] for task, row in named},
            accuracy={task.name: row[2] / row[1] for task, row in named if task.target == "classification"},
            tokens=int(tokens),
            load_LME=load_LME,
        )
        self._clear()
        return means


def _shares(load_LME: torch.Tensor) -> np.ndarray:
    return (load_LME / load_LME.sum(-1, keepdim=True).clamp_min(1.0)).cpu().numpy()
