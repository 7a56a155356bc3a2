"""Checkpoints of a real engine in this process: what does not fit is refused, and what is written in the background."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moemm.checkpoint import newest_complete, read_manifest, state, verify
from moemm.checkpoint.files import sha256_file
from moemm.checkpoint.state import RankState
from moemm.distributed import connect
from moemm.errors import CheckpointError, HealthError
from moemm.testing.tiny import tiny_config
from moemm.train.callbacks import Callback, CheckpointingCallback
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("alone")
STEP = 2


class Messages(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_message(self, text: str) -> None:
        self.texts.append(text)


class At(Callback):
    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self._step, self._action = step, action

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        if trainer.step == self._step:
            self._action()


def build(data: Path, output: Path, *callbacks: Callback, stage: int = 0, **train: Any) -> Trainer:
    train = {"output": str(output), "steps": STEP, "lr": 1e-2, **train}
    loaded = tiny_config(data, train=train, deepspeed={"zero_stage": stage})
    setup, _ = prepare(loaded, resume=False)
    return Trainer(setup, connect(timeout_s=60), list(callbacks), StopRequest())


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Two steps under ZeRO-2, and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        trainer = build(tiny_data, tmp_path_factory.mktemp("trained"), CheckpointingCallback(every=0), stage=2)
        trainer.run()
        yield trainer
        trainer.close()


def held(trainer: Trainer) -> str:
    """SHA-256 of all that a rank would write."""
    digest = hashlib.sha256()
    for tensors in trainer.engine.state().tensors.values():
        for name, value in tensors.items():
            digest.update(name.encode() + value.numpy().tobytes())
    digest.update(b"".join(value.detach().numpy().tobytes() for value in trainer.engine.model.parameters()))
    return digest.hexdigest()


def change(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    edit(tensors, metadata)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)


def seal(folder: Path) -> None:
    """Make the folder whole again, whatever was done to it."""
    manifest = read_manifest(folder)
    present = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    files = {name: {"size": path.stat().st_size, "sha256": sha256_file(path)} for name, path in present.items()}
    dataclasses.replace(manifest, files=files).write(folder)
    verify(folder)


NAME = "trunk.blocks.0.attention.qkv.weight"


def drop(name: str) -> Callable[[dict[str, torch.Tensor], dict[str, str]], Any]:
    return lambda tensors, _: tensors.pop(name)


def cut(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors[NAME] = tensors[NAME][:-1]


def turn(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors[NAME] = tensors[NAME].T


def part(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    value = tensors.pop(NAME)
    tensors[f"{NAME}@0"] = value.flatten()[:-1]
    shape = ", ".join(map(str, value.shape))
    metadata["moemm"] = f'{{"fragments": {{"{NAME}@0": ["{NAME}", 0, [{shape}]]}}}}'


def more(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["trunk.more"] = torch.zeros(2)


def whole_numbers(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors[NAME] = tensors[NAME].long()


MODEL, OPTIMIZER = "model.safetensors", "optimizer_00000.safetensors"
MUTATIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensor": (lambda folder: change(folder / MODEL, drop(NAME)), f"{NAME} is not there"),
    "cut short": (lambda folder: change(folder / MODEL, cut), f"{NAME} has the shape"),
    "turned": (lambda folder: change(folder / MODEL, turn), f"{NAME} has the shape"),
    "a part": (lambda folder: change(folder / MODEL, part), f"{NAME} lacks its elements from"),
    "another kind": (lambda folder: change(folder / MODEL, whole_numbers), f"{NAME} is no tensor of floating"),
    "one more": (lambda folder: change(folder / MODEL, more), "trunk.more is not part of this model"),
    "no moment": (lambda folder: change(folder / OPTIMIZER, drop(f"exp_avg/{NAME}")), f"exp_avg/{NAME} is not there"),
    "no steps": (lambda folder: change(folder / OPTIMIZER, lambda _, metadata: metadata.clear()), "no count of steps"),
    "swapped": (lambda folder: shutil.copy(folder / OPTIMIZER, folder / MODEL), "is not there"),
    "no weights": (lambda folder: (folder / MODEL).unlink(), "is not there"),
    "no random states": (lambda folder: (folder / "random_00000.safetensors").unlink(), "random_00000"),
    "no random state": (
        lambda folder: change(folder / "random_00000.safetensors", drop("python")),
        "the random states lack python",
    ),
}
"""Done to a checkpoint whose manifest was then made to agree; what is said."""


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_what_does_not_fit_is_refused_before_a_weight_is_touched(
    trained: Trainer, tmp_path: Path, mutation: str
) -> None:
    folder = tmp_path / "step_000002"
    shutil.copytree(trained.setup.checkpoints / folder.name, folder)
    edit, said = MUTATIONS[mutation]
    edit(folder)
    seal(folder)
    before = held(trained)
    with pytest.raises(CheckpointError) as raised:
        trained.restore(folder, STEP)
    assert "is whole, but its state does not fit this run" in str(raised.value) and said in str(raised.value)
    assert held(trained) == before and trained.step == STEP


def test_what_was_written_comes_back(trained: Trainer) -> None:
    """Also after everything was overwritten, random states too."""
    folder = trained.setup.checkpoints / "step_000002"
    trained.restore(folder, STEP)
    before, drawn = held(trained), torch.rand(3)
    for fragment in state_of(trained):
        fragment.zero_()
    torch.manual_seed(5)
    assert held(trained) != before
    trained.restore(folder, STEP)
    assert held(trained) == before and torch.equal(torch.rand(3), drawn)


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    files = trainer.engine.state().tensors
    return [value for name, tensors in files.items() if not name.startswith("random") for value in tensors.values()]


class Gate:
    """Holds back whatever is written until it is opened, `RankState.write` in a thread."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened, write = threading.Event(), RankState.write
        self.threads: list[str] = []

        def held_back(rank_state: RankState, folder: Path) -> list[Path]:
            self.threads.append(threading.current_thread().name)
            assert self.opened.wait(60)
            return write(rank_state, folder)

        patch.setattr(RankState, "write", held_back)


BACKGROUND = {"every": 1, "keep": 9, "background": True}


def names(trainer: Trainer) -> list[str]:
    return sorted(path.name for path in trainer.setup.checkpoints.iterdir())


def test_a_background_save_holds_the_step_that_it_was_begun_at(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps go by before a byte of the first save is written; the run's checkpoints are those of another run that
    stops for each."""  # fmt: skip
    before = build(tiny_data, tmp_path / "stops", CheckpointingCallback(every=1), steps=4, checkpoint={"keep": 9})
    before.run()
    before.close()
    gate = Gate(monkeypatch)
    opened = At(3, gate.opened.set)
    trainer = build(
        tiny_data, tmp_path / "goes on", opened, CheckpointingCallback(every=4),
        At(1, lambda: trainer.save(background=True)), steps=4, checkpoint=BACKGROUND,
    )  # fmt: skip
    trainer.run()
    assert names(trainer) == ["latest", "step_000001", "step_000004"]
    assert gate.threads == ["checkpoint", "MainThread"], "the last one is waited for"
    for step in (1, 4):
        other, own = (one.setup.checkpoints / f"step_{step:06d}" for one in (before, trainer))
        for name in read_manifest(own).files:
            assert (own / name).read_bytes() == (other / name).read_bytes()
    trainer.close()


def test_failures_in_the_background_count(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said, real = Messages(), state.save_tensors
    fails = At(2, lambda: monkeypatch.setattr(state, "save_tensors", full))
    works = At(4, lambda: monkeypatch.setattr(state, "save_tensors", real))
    saves = CheckpointingCallback(every=1)
    trainer = build(tiny_data, tmp_path, said, fails, works, saves, steps=6, checkpoint=BACKGROUND)
    trainer.run()
    warnings = [text for text in said.texts if "No space left" in text]
    assert len(warnings) == 2 and "1 of 3 failures" in warnings[0] and "2 of 3" in warnings[1]
    assert names(trainer) == ["latest", *(f"step_{step:06d}" for step in (1, 4, 5, 6))]
    trainer.close()
    monkeypatch.setattr(state, "save_tensors", full)
    trainer = build(tiny_data, tmp_path / "b", CheckpointingCallback(every=1), steps=9, checkpoint=BACKGROUND)
    with pytest.raises(CheckpointError, match="3 saves in a row failed"):
        trainer.run()
    assert trainer.step == 4, "the third failure is known when the fourth save is due"
    trainer.close()


def test_a_signal_waits_for_what_is_under_way(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    trainer = build(tiny_data, tmp_path, CheckpointingCallback(every=2), steps=9, checkpoint=BACKGROUND)
    timer = threading.Timer(0.2, gate.opened.set)
    trainer._callbacks.append(At(2, lambda: setattr(trainer._stop, "number", signal.SIGTERM)))
    trainer._callbacks.append(At(2, timer.start))
    assert not trainer.run()
    assert names(trainer) == ["latest", "step_000002", "step_000003"]
    trainer.close()


def test_an_error_waits_for_what_is_under_way(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        threading.Timer(0.2, gate.opened.set).start()
        raise HealthError("the loss is not finite")

    gate = Gate(monkeypatch)
    saves = CheckpointingCallback(every=2)
    trainer = build(tiny_data, tmp_path, saves, At(3, broken), steps=9, checkpoint=BACKGROUND)
    with pytest.raises(HealthError):
        trainer.run()
    assert names(trainer) == ["latest", "step_000002"]
    assert newest_complete(trainer.setup.checkpoints).manifest.step == 2
    trainer.close()
