"""`train` and `load_run`: what `moemm train` and `moemm evaluate` call."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moemm.checkpoint import Found, check_compatible, find_newest, newest_complete
from moemm.checkpoint.resume import changed_keys, nothing_completed
from moemm.checkpoint.store import load_weights
from moemm.config import Config, LoadedConfig, to_dict
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.data.cost import costly_arrays
from moemm.data.shared import held_open, open_shared
from moemm.distributed import World, choose_cpu_threads, connect, on_board, on_main
from moemm.errors import CheckpointError
from moemm.modalities import ModalitySpec
from moemm.observe.heartbeat import FILE_NAME as HEARTBEAT
from moemm.observe.heartbeat import Heartbeat
from moemm.plugins import load_stored as load_stored_config
from moemm.points import arm_from_environment
from moemm.train.callbacks import (
    Callback,
    CheckpointingCallback,
    ConsoleCallback,
    HeartbeatCallback,
    JsonLinesCallback,
    TensorBoardCallback,
    check_sinks,
    sinks,
)
from moemm.train.results import summarize, write_summary
from moemm.train.setup import (
    CHECKPOINTS,
    CONFIG,
    SUMMARY,
    Setup,
    check_catalogue,
    load_stored,
    prepare,
    seeded_model,
    stored_catalogue,
)
from moemm.train.signals import StopRequest, exit_code, stop_requests
from moemm.train.trainer import Trainer


def train(
    loaded: LoadedConfig, *, resume: bool = False, extra_callbacks: list[Callback] | None = None
) -> dict[str, Any]:
    """Train the model that a configuration describes, on all ranks that the launcher started.

    resume: go on from the newest complete checkpoint of `train.output`; with none there, begin anew.
    extra_callbacks: called before the checkpoint is saved.
    Returns on rank 0 the summary (see summary.json), on other ranks only "exit_code": 0 when done, or that of the
    signal that stopped it (signals.EXIT_CODES). Raises MoemmError's children, the same on all ranks.
    """
    arm_from_environment()
    world = connect(timeout_s=loaded.config.deepspeed.timeout_s)
    choose_cpu_threads(world, workers=loaded.config.data.num_workers)
    on_main(lambda: check_sinks(loaded.config.observe))
    with held_open():
        setup, going_on = prepare(loaded, resume=resume)
        with stop_requests() as stop, on_board(setup.folder, world):
            return _train(setup, world, stop, going_on=going_on, wanted=resume, extra=extra_callbacks or [])


def _train(
    setup: Setup, world: World, stop: StopRequest, *, going_on: bool, wanted: bool, extra: list[Callback]
) -> dict[str, Any]:
    callbacks = _callbacks(setup, world, extra)
    found = _find(setup) if going_on else None
    trainer = Trainer(setup, world, callbacks, stop, start=found)
    try:
        for file in dict.fromkeys(task.file for task in setup.catalogue.tasks if world.is_main):
            for remark in costly_arrays(open_shared(file).layout):
                trainer.tell(f"warning: {file}: {remark}")
        if found is not None:
            _restore(trainer, found)
        elif wanted:
            cut_off = "".join(f"; {name} was never completed" for name in nothing_completed(setup.checkpoints) or ())
            trainer.tell(f"nothing to resume in {setup.folder}{cut_off}: training from the start")
        if not trainer.run():
            name = signal.Signals(trainer.stopped_by).name
            trainer.tell(f"stopped by {name}; saved step {trainer.step}.{_how_to_go_on()}")
            return {"exit_code": exit_code(trainer.stopped_by), "steps": trainer.step}
        return _finish(trainer)
    finally:
        trainer.close()


def _callbacks(setup: Setup, world: World, extra: list[Callback]) -> list[Callback]:
    config = setup.config
    callbacks: list[Callback] = [ConsoleCallback(), JsonLinesCallback(), TensorBoardCallback()]
    if world.is_main:
        heartbeat = Heartbeat(
            setup.folder / HEARTBEAT, ranks=world.size, every_s=config.observe.heartbeat_s,
            patience_s=config.deepspeed.timeout_s,
        )  # fmt: skip
        heartbeat.beat("start", total_steps=setup.total_steps)
        callbacks += [HeartbeatCallback(heartbeat), *sinks(config.observe)]
    return [*callbacks, *extra, CheckpointingCallback(every=config.train.checkpoint.every)]


def _find(setup: Setup) -> Found:
    return find_newest(setup.checkpoints, check=lambda manifest: check_compatible(manifest, setup.config))


def _restore(trainer: Trainer, found: Found) -> None:
    for name, reason in found.skipped:
        trainer.tell(f"skipped {name}: {reason}")
    if found.manifest.weights_only:
        trainer.tell(f"began with the weights of {found.folder}")
        return
    trainer.restore(found.folder, found.manifest.step)
    trainer.tell(f"resumed from {found.folder} (step {found.manifest.step})")
    changed = list(changed_keys(found.manifest.config, to_dict(trainer.config)).values())
    if changed:
        trainer.tell(f"settings that changed since step {found.manifest.step}: {', '.join(changed)}")


def _finish(trainer: Trainer) -> dict[str, Any]:
    done = trainer.setup.folder / SUMMARY
    if trainer.seconds == 0.0 and done.exists():  # resumed a run that had ended
        summary: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    else:
        scores = {split: trainer.evaluate(split) for split in ("val", "test")}
        if not trainer.world.is_main:
            return {"exit_code": 0}
        summary = summarize(trainer, scores)
        write_summary(trainer.setup.folder, summary)
    trainer.finish(summary)
    return {**summary, "exit_code": 0}


def _how_to_go_on() -> str:
    """The command that goes on: this one with --resume."""
    arguments = [word for word in sys.argv[1:] if word.partition("=")[0] not in ("--local_rank", "--local-rank")]
    if not arguments or arguments[0] != "train":
        return " Go on with train(..., resume=True)."
    if "--resume" not in arguments:
        arguments.append("--resume")
    return f" Go on with: moemm {shlex.join(arguments)}   (behind the same launcher, if there was one)"


@dataclass(frozen=True, slots=True)
class Run:
    """A trained run: its model in eval mode on the CPU, with the weights of the newest complete checkpoint."""

    config: Config
    catalogue: Catalogue
    specs: dict[str, ModalitySpec]
    model: nn.Module
    folder: Path
    step: int


def load_run(path: Path | str, *, plugins: Sequence[Path | str] = ()) -> Run:
    """Load a run folder, for evaluation; needs no DeepSpeed and no process group.

    plugins: Python files to run in place of the run's own copies; moemm/plugins.py says when it runs these.
    Raises CheckpointError: no run, no complete checkpoint, or data that is not what the run was trained on.
    """
    folder = Path(path)
    config = _stored_config(folder, plugins)
    specs, stored = load_stored(folder)
    catalogue = build_catalogue(config.data, base=folder)
    check_catalogue(stored, catalogue)
    found = newest_complete(folder / CHECKPOINTS)
    model = seeded_model(Setup(config, catalogue, specs, folder, found.manifest.step), torch.device("cpu"))
    load_weights(model, found.folder)
    return Run(config, catalogue, specs, model.eval(), folder, found.manifest.step)


def load_outline(path: Path | str, *, plugins: Sequence[Path | str] = ()) -> Run:
    """A run as its folder describes it: config, tasks, modalities, and a model with *fresh* weights, for its shapes.

    Needs neither the data nor a checkpoint; `step` is that of the newest complete one, or 0.
    Raises CheckpointError: no run, or files of it that cannot be read.
    """
    folder = Path(path)
    try:
        step = newest_complete(folder / CHECKPOINTS).manifest.step
    except CheckpointError:
        step = 0
    return described_run(folder, plugins, step)


def described_run(folder: Path, plugins: Sequence[Path | str], step: int) -> Run:
    """A run with fresh weights from the files in `folder` alone. plugins, and what is raised, as `load_outline`."""
    config = _stored_config(folder, plugins)
    specs, stored = load_stored(folder)
    catalogue = stored_catalogue(stored)
    with torch.random.fork_rng(devices=[]):
        model = seeded_model(Setup(config, catalogue, specs, folder, step), torch.device("cpu"))
    return Run(config, catalogue, specs, model.eval(), folder, step)


def _stored_config(folder: Path, plugins: Sequence[Path | str]) -> Config:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no {CONFIG}. Give train.output of a run.")
    return load_stored_config(folder, CONFIG, plugins).config
