"""One micro-batch: the objective of the *global* batch, and what is counted on the way. T tasks.

Every sample of a step counts the same (times its task's weight), on whichever rank and in whichever micro-batch it is.
Where tasks share a sample, the sum of its losses counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moemm.config import Config
from moemm.config.check_objectives import is_on, label_free, objective_sections
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.sample import PackedBatch
from moemm.distributed import World, sum_over_ranks
from moemm.harmonize import LossScale
from moemm.models import ModelOutput, Sums
from moemm.moe import router_loss
from moemm.objectives import supervised_losses
from moemm.observe.routing import RouterReport
from moemm.train.labels import Labels, Rows
from moemm.train.routing import RoutingWindow
from moemm.train.schedule import objective_weight


@dataclass(slots=True)
class MicroLoss:
    """Losses of one micro-batch on this rank.

    backward: what the engine gets; averaged over ranks and micro-batches its gradient is that of the objective.
    parts_L: what it is the sum of: the tasks', if they are learned from, those of objectives without labels, the rest.
    sums_T: per task the sum over the samples, without the task's weight. router: of the micro-batch of all ranks.
    missing: of the regression of absent modalities, sum over the samples, times its weight.
    pretext: per objective without labels (sum over the samples, number of them), without the objective's weight.
    outputs, targets: of the tasks, the rows that count.
    """

    backward: torch.Tensor
    parts_L: torch.Tensor
    sums_T: torch.Tensor
    router: torch.Tensor
    missing: torch.Tensor
    pretext: Sums
    outputs: Rows
    targets: Rows

    def broken(self, names: tuple[str, ...]) -> list[str]:
        """Tasks whose loss is not finite, `objective NAME` of those without labels, `router`, `missing`."""
        names = (*names, *(f"objective {name}" for name in self.pretext), "router", "missing")
        pretext = [loss.detach().reshape(1) for loss, _ in self.pretext.values()]
        finite = torch.isfinite(torch.cat([self.sums_T, *pretext, torch.stack([self.router, self.missing])])).tolist()
        return [name for name, fine in zip(names, finite, strict=True) if not fine]


class Objective:
    """Supervised losses + objectives without labels + router losses, scaled for the engine.

    total_steps: that the schedules of the objectives' weights go over.
    allowed_LME: which modality may use which routed expert; None for a model without a router.
    scale: what weighs the losses of tasks and of objectives without labels, besides their own weights.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        config: Config,
        world: World,
        *,
        total_steps: int,
        allowed_LME: torch.Tensor | None,
        scale: LossScale | None = None,
    ) -> None:
        self._by_value = scale
        self.tasks, self._world, self._allowed_LME = catalogue.tasks, world, allowed_LME
        self._config, self._total_steps = config.objectives, total_steps
        self._supervised = is_on(config.objectives.supervised)
        self._labels = Labels(catalogue, config, world.device)
        self._router_losses, self._smoothing = config.model.router.losses, config.train.label_smoothing
        self._missing_weight = config.model.missing.weight or 1.0
        # The engine divides by ranks x micro-batches; the samples of the step are batch_size.
        self._scale = world.size * config.train.accumulation / config.train.batch_size
        self._weights_T = torch.tensor([task.weight for task in self.tasks], device=world.device)
        self.begin(0)

    def begin(self, step: int) -> None:
        """Take the objectives' weights of this 0-based step."""
        self._weights = {
            name: objective_weight(step, total=self._total_steps, config=one)
            for name, one in objective_sections(self._config).items()
        }

    def __call__(self, output: ModelOutput, batch: PackedBatch) -> MicroLoss:
        """Losses of one micro-batch; every rank calls it together (the router's statistics are summed over ranks)."""
        picked = [self._labels.pick(outputs, batch) for outputs in (output.outputs, *output.earlier)]
        every = [self._sums(*one) for one in picked]
        sums_T, mean_T = every[0], torch.stack(every).mean(0) if output.earlier else every[0]
        by_loss, term = self._by_values(mean_T.detach(), picked[0][1], output)
        weights_T = self._weights_T
        if by_loss:
            weights_T = weights_T * torch.stack([by_loss.get(task.name, torch.ones_like(term)) for task in self.tasks])
        tasks_T = self._weights["supervised"] * weights_T * mean_T
        pretext_O = [self._weights[name] * by_loss.get(name, 1.0) * loss for name, (loss, _) in output.pretext.items()]
        router = self._router(output) if output.router is not None else sums_T.new_zeros(())
        missing = sums_T.new_zeros(()) if output.missing is None else self._missing_weight * output.missing
        rest = self._scale * missing + router + term
        if not self._supervised:
            rest, tasks_T = rest + self._scale * tasks_T.sum(), tasks_T[:0]
        parts_L = torch.cat([self._scale * torch.stack([*tasks_T, *pretext_O]), rest.reshape(1)])
        sums = (sums_T.detach(), router.detach(), missing.detach(), output.pretext)
        return MicroLoss(parts_L.sum(), parts_L, *sums, *picked[0])

    def _by_values(
        self, mean_T: torch.Tensor, targets: Rows, output: ModelOutput
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Loss -> its weight by `harmonize.scale`, and what that adds to the objective: 0, with a gradient."""
        if self._by_value is None:
            return {}, mean_T.new_zeros(())
        found: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {
            task.name: (loss, mean_T.new_tensor(len(targets[task.name])), self._weights["supervised"] * task.weight)
            for task, loss in zip(self.tasks, mean_T, strict=True)
        }
        found |= {name: (loss.detach(), number, self._weights[name]) for name, (loss, number) in output.pretext.items()}
        sums, counts, own = zip(*(found[name] for name in self._by_value.losses), strict=True)
        sums_2L = torch.stack([torch.stack(sums), torch.stack(counts)])
        w_L, term = self._by_value.weigh(sums_2L, sums_2L.new_tensor(own), output.learned)
        return dict(zip(self._by_value.losses, w_L, strict=True)), term

    def _sums(self, outputs: Rows, targets: Rows) -> torch.Tensor:
        """(T,) sums over the samples of each task."""
        losses = supervised_losses(outputs, targets, self.tasks, label_smoothing=self._smoothing)
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
    objectives: dict[str, float]
    losses: dict[str, float]
    accuracy: dict[str, float]
    tokens: int
    routing: RouterReport | None


class Window:
    """Counts since the last report, on this rank; no synchronisation until `take`."""

    def __init__(self, tasks: tuple[TaskInfo, ...], config: Config, world: World) -> None:
        self._tasks, self._world = tasks, world
        self._routing = RoutingWindow()
        self._samples = config.train.batch_size / config.train.accumulation  # of a micro-batch, over all ranks
        self._objectives = label_free(config.objectives)
        self._clear()

    def _clear(self) -> None:
        # Columns: sum of losses, samples, samples that were right.
        self._counts_TC = torch.zeros(len(self._tasks), 3, dtype=torch.float64, device=self._world.device)
        # Columns: sum of losses, samples that they concern.
        self._pretext_OC = torch.zeros(len(self._objectives), 2, dtype=torch.float64, device=self._world.device)
        # Router loss, tokens, the whole objective, the regression of absent modalities.
        self._rest = torch.zeros(4, dtype=torch.float64, device=self._world.device)
        self._micros = 0

    @property
    def filled(self) -> bool:
        """Whether there was a micro-batch since the last `take`; the same on all ranks."""
        return self._micros > 0

    def add(self, loss: MicroLoss, output: ModelOutput) -> None:
        """Count one micro-batch."""
        self._micros += 1
        self._counts_TC[:, 0] += loss.sums_T
        self._rest[0] += loss.router
        self._rest[1] += output.num_tokens
        self._rest[2] += loss.backward.detach()
        self._rest[3] += loss.missing
        for row, task in zip(self._counts_TC, self._tasks, strict=True):
            row[1] += len(loss.targets[task.name])
            if task.target == "classification":
                row[2] += (loss.outputs[task.name].argmax(-1) == loss.targets[task.name]).sum()
        for row, name in zip(self._pretext_OC, self._objectives, strict=True):
            row += torch.stack(loss.pretext[name]).detach()
        self._routing.add(output.router)

    def take(self) -> WindowMeans:
        """The means, over all ranks (all call it together); then begin anew."""
        counts = sum_over_ranks(self._counts_TC).tolist()
        pretext = sum_over_ranks(self._pretext_OC).tolist()
        router, tokens, objective, missing = sum_over_ranks(self._rest).tolist()
        micros = self._micros * self._world.size
        named = [(task, row) for task, row in zip(self._tasks, counts, strict=True) if row[1]]
        means = WindowMeans(
            loss=objective / micros,
            router_loss=router / micros,
            missing_loss=missing / (self._micros * self._samples),
            objectives={name: row[0] / row[1] for name, row in zip(self._objectives, pretext, strict=True) if row[1]},
            losses={task.name: row[0] / row[1] for task, row in named},
            accuracy={task.name: row[2] / row[1] for task, row in named if task.target == "classification"},
            tokens=int(tokens),
            routing=self._routing.take(),
        )
        self._clear()
        return means
