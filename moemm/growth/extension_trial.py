"""What an extension is planned by: a short fit of the new tokenizer, norms and head, through experts that are there.

L layers with a router, M rows, E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moemm.analyze.bits import bits
from moemm.analyze.units import pack
from moemm.config import Config
from moemm.data import SplitDataset
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.sample import PackedBatch, Sample
from moemm.errors import DataError
from moemm.growth.extension import check_shapes
from moemm.growth.grown import Specs, fresh_model
from moemm.models import Model
from moemm.objectives import supervised_losses

Weights = Mapping[str, torch.Tensor]
BATCH = 32


@dataclass(frozen=True, slots=True)
class Known:
    """What the extended run's data is: catalogue and specs, the tasks that came and modalities that their samples need.

    samples: of each task and split, at most. steps: of the fit. seed: of what is drawn.
    """

    catalogue: Catalogue
    specs: Specs
    tasks: tuple[TaskInfo, ...]
    modalities: tuple[str, ...]
    samples: int
    steps: int
    seed: int

    def batches(self, split: str) -> list[PackedBatch]:
        """Samples of the new tasks with the new modalities. Raises DataError where there are none."""
        found = [draw(self.catalogue, one, split, self.modalities, self.samples, self.seed) for one in self.tasks]
        samples = [sample for drawn in found for sample in drawn]
        if not samples:
            what = " and ".join(self.modalities) or "a new task"
            raise DataError(
                f"no sample of split {split} has {what}: nothing to choose experts and layers by\n"
                f"  allowed: data with samples of {what} in both splits train and val\n"
                "  to do: mark samples for it, or give both `layers` and `init` by hand (--layers all --init random)"
            )
        order = np.random.default_rng(self.seed).permutation(len(samples))
        return pack(self.catalogue, self.specs, [samples[number] for number in order], size=BATCH)


def draw(catalogue: Catalogue, task: TaskInfo, split: str, need: Sequence[str], limit: int, seed: int) -> list[Sample]:
    """Up to `limit` samples of a split that have all modalities of `need`, which may be none; the same for one seed."""
    dataset = SplitDataset(catalogue, task=task.name, split=split)
    has = np.ones(len(dataset), dtype=bool)
    for run, stored in zip(task.modalities, task.stored or task.modalities, strict=True):
        if run in need and len(dataset):
            has &= dataset.file.present(stored)[dataset.indices]
    items = np.random.default_rng(seed).permutation(np.flatnonzero(has))[:limit]
    return [dataset[int(item)] for item in items]


class Trial:
    """An extended model whose new parts, but for experts and routers, are fitted again for each question."""

    def __init__(self, config: Config, known: Known, old: Weights) -> None:
        """old: weights of the base, which stay. Raises ConfigError where no experts serve what is new, DataError."""
        self.model: Model = fresh_model(config, known.catalogue, known.specs).eval()
        drawn = self.model.state_dict()
        check_shapes(old, drawn)
        self._start = {name: value.clone() for name, value in {**drawn, **old}.items()}
        self._new = [name for name, _ in self.model.named_parameters() if name not in old and ".ffn." not in name]
        self._known, self._train, self._val = known, known.batches("train"), known.batches("val")

    def fit(self, change: Callable[[dict[str, torch.Tensor]], Weights] | None = None) -> None:
        """Begin with the same weights, as `change` makes them, and fit what is new and no expert for some steps."""
        self.model.load_state_dict(change(dict(self._start)) if change else self._start)
        parameters = []
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._new)
            parameters += [parameter] if name in self._new else []
        if not parameters:
            return
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for step in range(self._known.steps):
            batch = self._train[step % len(self._train)]
            losses = supervised_losses(self.model(batch).outputs, batch.targets, self.model.tasks)
            optimizer.zero_grad()
            (torch.stack(list(losses.values())).sum() / batch.num_samples).backward()
            optimizer.step()

    @torch.no_grad()
    def bits(self) -> float:
        """Bits a sample of val that are left open, mean over the new tasks."""
        found = []
        for task in self._known.tasks:
            outputs = torch.cat([self.model(batch).outputs[task.name] for batch in self._val])
            found.append(bits(task, outputs, torch.cat([batch.targets[task.name] for batch in self._val])))
        return sum(found) / len(found)

    def usage(self) -> torch.Tensor:
        """(L, E) share of each routed expert in the choices of the samples of val, by what they came with."""
        rows = [modality in self._known.modalities for modality, _ in self.model.map.rows]
        return usage(self.model, self._val, rows if any(rows) else None)


@torch.no_grad()
def usage(model: Model, batches: Sequence[PackedBatch], rows: Sequence[bool] | None = None) -> torch.Tensor:
    """(L, E) share of each routed expert in the choices of the tokens of some rows, or of all."""
    total_LE: torch.Tensor | None = None
    for batch in batches:
        stats = model(batch).router
        assert stats is not None, "asked only where there is a router"
        load_LME = stats.load_LME if rows is None else stats.load_LME[:, torch.tensor(rows)]
        total_LE = load_LME.sum(1) + (0 if total_LE is None else total_LE)
    assert total_LE is not None
    return total_LE / total_LE.sum(1, keepdim=True).clamp_min(1.0)


def router_shift(old_LE: torch.Tensor, new_LE: torch.Tensor, layers: Sequence[int]) -> dict[int, float]:
    """Layer -> deviation over experts of the shift of their usage from old to new samples (MoExtend, arXiv:2408.03511).

    layers: numbers of the layers that L stands for.
    """
    deviation_L = (new_LE - old_LE).std(dim=1, correction=0)
    return {layer: float(value) for layer, value in zip(layers, deviation_L, strict=True)}


def most_shifted(shift: Mapping[int, float], share: float) -> tuple[int, ...]:
    """That share of the layers, at least one, whose routers shift most; the lower one first among equals."""
    count = max(1, math.ceil(share * len(shift) - 1e-9))
    best = sorted(shift, key=lambda layer: (-shift[layer], layer))[:count]
    return tuple(sorted(best))
