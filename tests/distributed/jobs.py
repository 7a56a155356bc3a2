"""What runs inside the ranks of the tests beside this file. Arguments and results are JSON."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moemm.checkpoint import find_newest, state
from moemm.checkpoint.store import full_weights
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch
from moemm.distributed import World, broadcast_object, connect, gather_objects
from moemm.errors import CheckpointError, HealthError
from moemm.observe.records import Metrics
from moemm.testing.tiny import tiny_config
from moemm.train import trainer as trainer_module
from moemm.train.callbacks import Callback, CheckpointingCallback
from moemm.train.engine import Engine
from moemm.train.guard import GradientGuard
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest, stop_requests
from moemm.train.trainer import Trainer

SMALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 2000}}
"""ZeRO-3 keeps small weights whole; with these even a tiny model is really partitioned, and reduced during backward."""


class Recorder(Callback):
    every_rank = True

    def __init__(self) -> None:
        self.losses: list[list[float]] = []
        self.messages: list[str] = []

    def on_metrics(self, metrics: Metrics) -> None:
        extra = [metrics.missing_loss] if metrics.missing_loss else []
        self.losses.append([metrics.loss, metrics.router_loss, *metrics.losses.values(), *extra])
        if metrics.objectives:  # a batch may have no pair of modalities to align
            self.losses[-1] += [metrics.objectives.get(name, 0.0) for name in list(PRETEXT)[1:]]

    def on_message(self, text: str) -> None:
        self.messages.append(text)


def build(
    folder: Path, world: World, *, name: str, stage: int, resume: bool = False, stop: StopRequest | None = None,
    callbacks: tuple[Callback, ...] = (), extra: dict[str, Any] | None = None, **sections: dict[str, Any],
) -> tuple[Trainer, Recorder]:  # fmt: skip
    train = {"output": str(folder / name), "steps": 6, "batch_size": 8, "lr": 1e-2, **sections.pop("train", {})}
    mine = folder if world.is_main else folder / f"rank_{world.rank}"
    mine.mkdir(exist_ok=True)
    extra = (SMALL if stage == 3 else {}) if extra is None else extra
    loaded = tiny_config(mine, train=train, deepspeed={"zero_stage": stage, "extra": extra}, **sections)
    recorder = Recorder()
    setup, _ = prepare(loaded, resume=resume)
    return Trainer(setup, world, [recorder, *callbacks], stop or StopRequest()), recorder


def done(trainer: Trainer) -> None:
    trainer.close()
    gc.collect()


class Apart:
    """Deals every global batch of 8 out as 4 tones, then 4 shapes: of two ranks the first never sees an image."""

    def __init__(self, catalogue: Any, rank: int, world_size: int) -> None:
        self._sets = [SplitDataset(catalogue, task=task, split="train") for task in ("tones", "shapes")]
        self._packer, self._rank, self._share = Packer(catalogue), rank, 8 // world_size

    def __iter__(self) -> Iterator[PackedBatch]:
        for step in range(100):
            samples = [dataset[(4 * step + i) % len(dataset)] for dataset in self._sets for i in range(4)]
            yield self._packer(samples[self._rank * self._share : (self._rank + 1) * self._share])

    def close(self) -> None:
        pass


def parity(folder: str, stages: list[int]) -> dict[str, Any]:
    """Losses of six steps for each stage: as the sampler mixes, with the modalities apart, and in two micro-batches.

    The router's losses are those of a micro-batch over all ranks, which is the same samples for any number of them.
    """
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for stage in stages:
        for case in ("mixed", "apart", "accumulated") if stage in (0, 2) else ("mixed", "apart"):
            train = {"accumulation": 2} if case == "accumulated" else {}
            trainer, recorder = build(
                Path(folder), world, name=f"{case}_{stage}_{world.size}", stage=stage, train=train
            )
            with pytest.MonkeyPatch.context() as patch:
                if case == "apart":
                    deal(patch, Apart)
                elif case == "mixed":
                    found["samples"] = counted(patch, trainer)
                trainer.run()
            found[f"{case} {stage}"] = recorder.losses
            done(trainer)
    held = gather_objects(found["samples"])
    return {**found, "samples": [list(step) for step in zip(*held, strict=True)]}


def counted(patch: pytest.MonkeyPatch, trainer: Trainer) -> list[int]:
    """Filled with the number of samples of each batch of this rank."""
    sizes: list[int] = []
    following = trainer._next

    def count(batches: Any) -> PackedBatch:
        batch = following(batches)
        sizes.append(batch.num_samples)
        return batch

    patch.setattr(trainer, "_next", count)
    return sizes


class Lacking(Apart):
    """The same 8 shapes each step, without the records of rank 0 of two, and in every other step of two more."""

    def __iter__(self) -> Iterator[PackedBatch]:
        for step in range(100):
            samples = [self._sets[1][i] for i in range(8)]
            for sample in samples[: 4 if step % 2 else 6]:
                sample.modalities.pop("record", None)
            yield self._packer(samples[self._rank * self._share : (self._rank + 1) * self._share])


def absent(folder: str, stages: list[int], kinds: list[str]) -> dict[str, Any]:
    """Losses of six steps of models that stand in for modalities which one rank's samples lack, or have."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for kind in kinds:
        for stage in stages:
            name = f"{kind}_{stage}_{world.size}"
            trainer, recorder = build(Path(folder), world, name=name, stage=stage, model={"missing": {"kind": kind}})
            with pytest.MonkeyPatch.context() as patch:
                deal(patch, Lacking)
                trainer.run()
            found[f"{kind} {stage}"] = recorder.losses
            done(trainer)
    return found


class Unjoined(Apart):
    """4 vowels, then 4 digits with their motion: of two ranks the first never has a sample of two tasks."""

    def __init__(self, catalogue: Any, rank: int, world_size: int) -> None:
        self._sets = [SplitDataset(catalogue, task=task, split="train") for task in ("vowel", "digit")]
        self._packer, self._rank, self._share = Packer(catalogue), rank, 8 // world_size


def joint(folder: str, data: str, stages: list[int]) -> dict[str, Any]:
    """Losses of six steps with two labels of one sample beside another task: as the sampler mixes, and apart."""
    world = connect(timeout_s=60)
    avclip = {"file": "avclip.h5"}
    tasks = [
        {"name": "vowel", "file": "vowels.h5"},
        {"name": "digit", **avclip},
        {"name": "motion", "label": "label_motion", **avclip},
    ]
    sections = {"data": {"root": data, "num_workers": 0, "tasks": tasks, "joint_labels": True}}
    found: dict[str, Any] = {}
    for stage in stages:
        for case in ("mixed", "apart", "every block", "settled")[: 4 if stage in (0, 3) else 2]:
            more: dict[str, Any] = {
                "every block": {"model": {"predict_every_block": True}},
                "settled": {"harmonize": {"method": "upgrad", "per": "batch"}},
            }.get(case, {})
            trainer, recorder = build(
                Path(folder), world, name=f"joint_{case}_{stage}_{world.size}", stage=stage, **sections, **more
            )
            with pytest.MonkeyPatch.context() as patch:
                if case != "mixed":
                    deal(patch, Unjoined)
                trainer.run()
            found[f"{case} {stage}"] = recorder.losses
            done(trainer)
        found |= judged(Path(folder), world, data, stage)
    return found


def judged(folder: Path, world: World, data: str, stage: int) -> dict[str, Any]:
    """Losses of six steps on triplets whose pairs disagree in places, and are thought wrong in others; and without."""
    sections = {
        "data": {"root": data, "num_workers": 0, "tasks": [{"name": "digits", "file": "digits_hard.h5"}]},
        "objectives": {"contrastive": {"weight": 1.0, "pairs": [["image", "audio"], ["image", "pen"]]}},
    }
    found = {}
    for case, harmonize in {"judged": {"method": "curriculum", "gamma": -0.05}, "unjudged": {}}.items():
        trainer, recorder = build(
            folder, world, name=f"{case}_{stage}_{world.size}", stage=stage, harmonize=harmonize,
            train={"batch_size": 16}, **sections,
        )  # fmt: skip
        noise = trainer.pretext.noise  # type: ignore[union-attr]
        if case == "judged":
            noise.start = 0.0
            rows = torch.arange(noise.right_RP.numel()).view_as(noise.right_RP)
            noise.right_RP[:] = (rows % 7) / 7.0
            noise.advance = lambda *_: None
        trainer.run()
        found[f"{case} {stage}"] = recorder.losses
        done(trainer)
    return found


PRETEXT = {
    "supervised": {"weight": 0.5, "start": 1.0},
    "masked": {"weight": 1.0, "cross_modal": 0.4},
    "contrastive": {"weight": 0.5},
    "similarity": {"weight": 0.3},
    "replaced": {"weight": 0.7, "ratio": 0.3},
}


BAGS: dict[str, dict[str, Any]] = {
    "objectives": {**PRETEXT, "contrastive": {"weight": 0.5, "loss": "mil_nce"}},
    "train": {"batch_size": 16},
    "data": {
        "tasks": [{"name": "shapes", "file": "shapes.h5", "bags": "group"}, {"name": "tones", "file": "tones.h5"}],
    },
}


def pretext(folder: str, stages: list[int]) -> dict[str, Any]:
    """Losses of six steps with every objective: as the sampler mixes, apart, in half the labels, without labels."""
    world = connect(timeout_s=60)
    cases: dict[str, dict[str, Any]] = {
        "mixed": {"objectives": PRETEXT},
        "siglip": {"objectives": {**PRETEXT, "contrastive": {"weight": 0.1, "loss": "siglip"}}},
        "mil_nce": BAGS,
        "apart": {"objectives": PRETEXT},
        "unlabelled": {"objectives": {**PRETEXT, "supervised": {"weight": 0.0}}},
    }
    found: dict[str, Any] = {}
    for stage in stages:
        for case, sections in cases.items():
            trainer, recorder = build(
                Path(folder), world, name=f"pretext_{case}_{stage}_{world.size}", stage=stage, **sections
            )
            with pytest.MonkeyPatch.context() as patch:
                if case == "apart":
                    deal(patch, Apart)
                trainer.run()
            found[f"{case} {stage}"] = recorder.losses
            done(trainer)
    return found


HARMONIZED: dict[str, dict[str, Any]] = {
    "sum": {},
    "upgrad sample": {"method": "upgrad"},
    "pcgrad batch": {"method": "pcgrad", "per": "batch"},
    "gradvac modality": {"method": "gradvac", "per": "modality"},
    "curriculum accumulated": {"method": "curriculum", "gamma": 0.05, "gamma_start": -0.1},
    "mgda apart": {"method": "mgda", "per": "batch"},
    "upgrad trunk": {"method": "upgrad", "at": "trunk", "scale": "uncertainty"},
    "mgda trunk accumulated": {"method": "mgda", "at": "trunk"},
    "uncertainty": {"scale": "uncertainty"},
    "dwa": {"scale": "dwa", "scale_window": 2},
    "famo accumulated": {"scale": "famo", "scale_rate": 0.2},
    "famo upgrad apart": {"scale": "famo", "scale_rate": 0.2, "method": "upgrad", "per": "batch"},
    "gradnorm": {"scale": "gradnorm", "scale_rate": 0.1},
}


def harmonized(folder: str, cases: list[tuple[str, int]]) -> dict[str, Any]:
    """Losses of six steps with conflicts settled; in micro-batches, and with modalities and views on one rank alone."""
    world = connect(timeout_s=60)
    objectives = {**PRETEXT, "similarity": {"weight": 2.0}}
    found: dict[str, Any] = {}
    for case, stage in cases:
        trainer, recorder = build(
            Path(folder), world, name=f"harmonized_{case.replace(' ', '_')}_{stage}_{world.size}", stage=stage,
            objectives=objectives, harmonize=HARMONIZED[case],
            train={"accumulation": 2 if "accumulated" in case else 1},
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            if "apart" in case:
                deal(patch, Apart)
            trainer.run()
        found[f"{case} {stage}"] = recorder.losses
        done(trainer)
    return found


RECOMPUTED: dict[str, dict[str, Any]] = {
    "settled": {
        "model": {"dropout": 0.2, "router": {"kind": "noisy"}},
        "objectives": {"masked": {"weight": 1.0}, "similarity": {"weight": 2.0}},
        "harmonize": {"method": "upgrad"},
        "train": {"accumulation": 2},
    },
    "every block": {"model": {"dropout": 0.2, "predict_every_block": True}},
    "without dropout": {},  # whose mask would be the first thing that a block's backward pass asks for
}


class Loads(Callback):
    """What the routers are said to have done."""

    every_rank = True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_metrics(self, metrics: Metrics) -> None:
        assert metrics.routing is not None
        self.seen.append([metrics.routing.load_LME.tolist(), metrics.routing.tokens_M.tolist()])


def recomputed(folder: str, cases: list[tuple[str, int]]) -> dict[str, Any]:
    """Of runs that keep what is in a block, and of such that compute it again: losses, loads, weights."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for case, stage in cases:
        for again in (False, True):
            sections = {name: dict(section) for name, section in RECOMPUTED[case].items()}
            train, loads = {**sections.pop("train", {}), "activation_checkpointing": again}, Loads()
            name = f"recomputed_{case.replace(' ', '_')}_{stage}_{again}"
            trainer, recorder = build(
                Path(folder), world, name=name, stage=stage, train=train, callbacks=(loads,), **sections
            )
            trainer.run()
            found.setdefault(f"{case} {stage}", []).append(
                [recorder.losses, loads.seen, digest(trainer.engine, world), trainer.step]
            )
            done(trainer)
    return found


def placed(folder: str, cases: list[tuple[str, int]]) -> dict[str, Any]:
    """What DeepSpeed's engine is given: elements that the parameters hold on this rank, their types; all elements."""
    import deepspeed

    world, initialize = connect(timeout_s=60), deepspeed.initialize
    found: dict[str, Any] = {}
    given: list[Any] = []

    def begin(*, model: nn.Module, **named: Any) -> Any:
        parameters = list(model.parameters())
        given[:] = [sum(one.numel() for one in parameters), sorted({str(one.dtype) for one in parameters})]
        return initialize(model=model, **named)

    for precision, stage in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(deepspeed, "initialize", begin)
            train = {"precision": precision}
            trainer, _ = build(Path(folder), world, name=f"placed_{precision}_{stage}", stage=stage, train=train)
        found[f"{precision} {stage}"] = [*given, trainer.num_parameters[0]]
        done(trainer)
    return found


def deal(patch: pytest.MonkeyPatch, loader: type[Apart]) -> None:
    """Train on what `loader` deals out."""
    patch.setattr(
        trainer_module, "train_loader", lambda data, _, *, rank, world_size, **__: loader(data, rank, world_size)
    )


class TwoStems(nn.Module):
    """Two stems of equal size and one head, called as `mode` says: the trap in its two forms, and the two cures."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.audio, self.head = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, mode: str, rank: int) -> torch.Tensor:
        calls = {
            "same": [(self.image, 2), (self.audio, 2)],
            "zero rows": [(self.image, 2 * (1 - rank)), (self.audio, 2 * rank)],
            "set": [(self.image if rank == 0 else self.audio, 2)],
            "hidden": [(self.image, 2), (self.audio, 2), (lambda x: Hidden.apply(x, rank, self.image, self.audio), 2)],
            "order": [(self.image, 2), (self.audio, 2)][:: 1 if rank == 0 else -1],
            "no gradient": [(lambda x: Silent.apply(self.image(x), rank), 2), (self.audio, 2)],
        }[mode]
        return self.head(torch.cat([stem(torch.ones(rows, 8, requires_grad=True)) for stem, rows in calls])).sum()


class Hidden(torch.autograd.Function):
    """A function with a backward pass of its own, as re-entrant checkpointing has; which one differs by rank."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rank: int, image: nn.Module, audio: nn.Module) -> torch.Tensor:
        ctx.module = image if rank == 0 else audio
        return x.clone().requires_grad_()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None]:
        with torch.enable_grad():
            ctx.module(torch.ones(1, 8)).sum().backward()
        return None, None, None, None


class Silent(torch.autograd.Function):
    """A kernel that returns None for a gradient on rank 1, which the graph does not show."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rank: int) -> torch.Tensor:
        ctx.rank = rank
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, None]:
        return (None if ctx.rank == 1 else gradients[0]), None


def traps(folder: str, stages: list[int]) -> dict[str, str]:
    """What the guard says, and whether a weight changed, for each stage and mode."""
    world = connect(timeout_s=60)
    (Path(folder) / f"rank_{world.rank}").mkdir(exist_ok=True)
    found = {}
    for stage in stages:
        for mode in ("same", "zero rows", "set", "order", "no gradient", "hidden")[: 6 if stage == 0 else 5]:
            config = tiny_config(Path(folder) / f"rank_{world.rank}", deepspeed={"zero_stage": stage}).config
            torch.manual_seed(0)
            model = TwoStems()
            guard = GradientGuard(model, world_size=world.size, watch_forward=stage == 3)
            engine = Engine(model, config, world)
            before = digest(engine, world)
            try:
                loss = engine(mode, world.rank)
                guard.before_backward(loss)
                engine.backward(loss)
                engine.step(lr=1e-2)
                text = "no error"
            except HealthError as error:
                text = str(error)
            found[f"{stage} {mode}"] = ("changed: " if digest(engine, world) != before else "unchanged: ") + text
    return found


def digest(engine: Engine, world: World) -> str:
    """SHA-256 of all weights, on every rank."""
    weights = full_weights(engine.model, world, master=engine.deepspeed.bfloat16_enabled())
    text = hashlib.sha256()
    for name in sorted(weights):
        text.update(name.encode() + weights[name].numpy().tobytes())
    return broadcast_object(text.hexdigest())


Cases = list[tuple[int, str]]
DROPOUT = {"dropout": 0.2}
WEIGHED: dict[int, dict[str, Any]] = {
    1: {"scale": "famo"},
    2: {"scale": "uncertainty"},
    3: {"scale": "gradnorm"},
}
"""Stage -> what keeps a state of its own there."""


def whole(folder: str, cases: Cases) -> dict[str, Any]:
    """Six uninterrupted steps with dropout and a checkpoint every third; seconds of a save."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for stage, precision in cases:
        trainer, recorder = build(
            Path(folder), world, name=f"{stage}_{precision}", stage=stage, callbacks=(CheckpointingCallback(every=3),),
            model=DROPOUT, train={"precision": precision, "accumulation": 2}, harmonize=WEIGHED.get(stage, {}),
        )  # fmt: skip
        trainer.run()
        began = time.perf_counter()
        trainer.save()
        seconds = time.perf_counter() - began
        found[f"{stage} {precision}"] = [recorder.losses, digest(trainer.engine, world), seconds]
        done(trainer)
    return found


def resumed(folder: str, cases: Cases) -> dict[str, Any]:
    """The same from the newest complete checkpoint on, in new processes; what was skipped."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for stage, precision in cases:
        trainer, recorder = build(
            Path(folder), world, name=f"{stage}_{precision}", stage=stage, resume=True, model=DROPOUT,
            train={"precision": precision, "accumulation": 2}, harmonize=WEIGHED.get(stage, {}),
        )  # fmt: skip
        newest = find_newest(trainer.setup.checkpoints, check=lambda _: None)
        trainer.restore(newest.folder, newest.manifest.step)
        trainer.run()
        found[f"{stage} {precision}"] = [recorder.losses, digest(trainer.engine, world), newest.skipped]
        done(trainer)
    return found


class FullDisk(Callback):
    """From the first step on rank 1's disk is full for the given number of saves."""

    every_rank = True

    def __init__(self, failures: int, world: World, patch: pytest.MonkeyPatch) -> None:
        self.left, self._save = failures, state.save_tensors
        patch.setattr(state, "save_tensors", self if world.rank == 1 else state.save_tensors)

    def __call__(self, *arguments: Any, **options: Any) -> None:
        if self.left > 0:
            self.left -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._save(*arguments, **options)


def full_disk(folder: str, failures: int, background: bool = False) -> dict[str, Any]:
    """Twelve steps with a save every second, of which the first `failures` after a good one fail on rank 1."""
    train = {"steps": 12, "checkpoint": {"background": background}}
    world = connect(timeout_s=60)
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(0, world, patch)
        after_first = AfterStep(2, lambda: setattr(disk, "left", failures))
        trainer, recorder = build(
            Path(folder), world, name=f"disk_{failures}_{background}", stage=1, train=train,
            callbacks=(CheckpointingCallback(every=2), after_first),
        )  # fmt: skip
        try:
            trainer.run()
            error = ""
        except CheckpointError as problem:
            error = str(problem)
        left = sorted(path.name for path in trainer.setup.checkpoints.iterdir())
    done(trainer)
    return {"error": error, "messages": recorder.messages, "left": left, "step": trainer.step}


class AfterStep(Callback):
    every_rank = True

    def __init__(self, step: int, action: Any) -> None:
        self._step, self._action = step, action

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        if trainer.step == self._step:
            self._action()


def interrupted(folder: str) -> dict[str, Any]:
    """A SIGTERM to rank 1 alone after its second step, in a run of six, while a save is under way on rank 0."""
    world = connect(timeout_s=60)
    with stop_requests() as stop, pytest.MonkeyPatch.context() as patch:
        if world.is_main:
            patch.setattr(state, "save_tensors", lambda *arguments: (time.sleep(0.2), save_file(*arguments)))
        sender = AfterStep(2, lambda: os.kill(os.getpid(), signal.SIGTERM) if world.rank == 1 else None)
        trainer, _ = build(
            Path(folder), world, name="interrupted", stage=2, stop=stop,
            callbacks=(sender, CheckpointingCallback(every=2)), train={"checkpoint": {"background": True}},
        )  # fmt: skip
        finished = trainer.run()
    saved = sorted(path.name for path in trainer.setup.checkpoints.iterdir())
    done(trainer)
    return {"finished": finished, "step": trainer.step, "stopped_by": trainer.stopped_by, "saved": saved}


class Poisoned(Apart):
    """In the third global batch the first image of rank 1 is infinite."""

    def __iter__(self) -> Iterator[PackedBatch]:
        for step, batch in enumerate(super().__iter__()):
            if step == 2 and self._rank == 1:
                batch.modalities["image"].fields["data"][0] = float("inf")
            yield batch


def poisoned(folder: str, stages: list[int]) -> dict[str, Any]:
    """The error of a sample that breaks the loss on one rank, and the steps that were done."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for stage in stages:
        trainer, _ = build(Path(folder), world, name=f"nan_{stage}", stage=stage, train={"health": {"max_faulty": 1}})
        with pytest.MonkeyPatch.context() as patch:
            deal(patch, Poisoned)
            try:
                trainer.run()
            except HealthError as error:
                weights = full_weights(trainer.engine.model, world, master=False)
                finite = all(bool(torch.isfinite(value).all()) for value in weights.values())
                found[str(stage)] = [str(error), trainer.step, finite]
        done(trainer)
    return found


def several(folder: str, calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Several of the above in one job, because starting one takes longer than most of them."""
    return [globals()[name](folder=folder, **arguments) for name, arguments in calls]
