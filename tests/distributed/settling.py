"""What runs inside the ranks of test_settling.py: gradients of one step, settled in many ways from the same weights."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import torch
from jobs import SMALL

from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch
from moemm.distributed import World, connect
from moemm.harmonize import Settler
from moemm.modalities import prepare_functions
from moemm.testing.tiny import tiny_config
from moemm.train.harmonizing import build_settler
from moemm.train.setup import Setup, prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer

OBJECTIVES = {
    "supervised": {"weight": 3.0},
    "masked": {"weight": 10.0, "ratio": 0.5},
    "contrastive": {"weight": 10.0},
    "similarity": {"weight": 3.0},
}
SAMPLES, GAMMA = 16, 0.03

Case = tuple[str, str]
"""(method, sample, modality, expert, batch or trunk)."""


def gradients(folder: str, plan: list[tuple[int, int, list[Case]]], precision: str = "fp32") -> None:
    """The gradients of every case, in FOLDER/PRECISION_WORLD_STAGE_ACCUMULATION.npz.

    plan: (stage, accumulation, cases).
    """
    world = connect(timeout_s=60)
    for stage, accumulation, cases in plan:
        with_gradients = Handover(Path(folder), world, (stage, accumulation, precision))
        found = {" ".join(case): with_gradients(*case) for case in cases}
        if world.is_main:
            np.savez(Path(folder) / f"{precision}_{world.size}_{stage}_{accumulation}.npz", **found)
        with_gradients.trainer.close()
        del with_gradients
        gc.collect()


class Handover:
    """A trainer that hands each step's gradient over instead of applying it, so that its weights stay what they are."""

    def __init__(self, folder: Path, world: World, way: tuple[int, int, str]) -> None:
        stage, accumulation, precision = way
        mine = folder if world.is_main else folder / f"rank_{world.rank}"
        loaded = tiny_config(
            mine,
            objectives=OBJECTIVES,
            train={
                "output": str(folder / "none"),
                "batch_size": SAMPLES,
                "accumulation": accumulation,
                "precision": precision,
            },
            harmonize={"method": "gradvac", "per": "batch"},
            deepspeed={"zero_stage": stage, "extra": SMALL if stage == 3 else {}},
        )
        setup, _ = prepare(loaded, resume=False)
        self.trainer = Trainer(setup, world, [], StopRequest())
        self.model = self.trainer.engine.model.train()
        self.fork = self.model.fork
        setup.config.harmonize.at, setup.config.harmonize.gamma = "trunk", GAMMA
        self.settler = build_settler(setup.config, self.model)
        self.batches = list(deal(setup, world, accumulation))
        self.apply = self.trainer.engine.step
        self.trainer.engine.step = self._hand_over  # type: ignore[method-assign]

    def _hand_over(self, *, lr: float) -> None:
        engine = self.trainer.engine.deepspeed
        if not engine.is_gradient_accumulation_boundary():
            self.apply(lr=lr)
            return
        from deepspeed.utils import safe_get_full_grad

        parts = [safe_get_full_grad(p) for p in self.model.parameters() if p.requires_grad]
        self.given = torch.cat([part.float().flatten() for part in parts]).numpy().copy()
        engine.optimizer.zero_grad()

    def __call__(self, method: str, per: str) -> np.ndarray:
        """The whole gradient of a step."""
        at_trunk, trainer = per == "trunk", self.trainer
        trainer._settler = self.settler if at_trunk and method != "sum" else None
        trainer._fork = self.model.fork = None if at_trunk or method == "sum" else self.fork
        if not at_trunk:
            self.fork.per = per
        settler: Settler = self.settler if at_trunk else self.fork
        settler.method = method
        for buffer in settler.buffers():
            buffer.zero_()
        trainer.engine.deepspeed.set_gradient_accumulation_boundary(None)
        trainer.engine.deepspeed.micro_steps = trainer.step = 0
        trainer._one_step(iter(self.batches))
        return self.given


def deal(setup: Setup, world: World, accumulation: int) -> list[PackedBatch]:
    """Each micro-batch as tones, then shapes: of two ranks the first never sees an image, and has no loss for one."""
    tones, shapes = (SplitDataset(setup.catalogue, task=task, split="train") for task in ("tones", "shapes"))
    pack, half = Packer(setup.catalogue, prepare_functions(setup.specs)), SAMPLES // accumulation // 2
    found = []
    for micro in range(accumulation):
        samples = [dataset[micro * half + i] for dataset in (tones, shapes) for i in range(half)]
        share = len(samples) // world.size
        found.append(pack(samples[world.rank * share : (world.rank + 1) * share]))
    return found
