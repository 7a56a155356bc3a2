"""Saves that are written while the caller goes on, in one process, with files of a few bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moemm.checkpoint import Keep, Manifest, Save, newest_complete, verify
from moemm.distributed import World
from moemm.errors import CheckpointError

COMMIT = __import__("moemm.checkpoint.commit", fromlist=["commit"])
WAIT_S = 30.0


class Slow:
    """Writes one file when it is let go."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def __call__(self, folder: Path) -> list[Path]:
        assert self.gate.wait(WAIT_S)
        (folder / "file").write_bytes(b"content")
        return [folder / "file"]


@pytest.fixture
def slow() -> Iterator[Slow]:
    write = Slow()
    yield write
    write.gate.set()


def begin(root: Path, write: Callable[[Path], list[Path]], step: int = 1) -> Save:
    def describe(files: dict[str, dict[str, Any]]) -> Manifest:
        return Manifest(
            step=step, world_size=1, zero_stage=0, config={}, config_hash="", versions={}, sampler={},
            expert_map=None, files=files,
        )  # fmt: skip

    return Save(root, step=step, write=write, describe=describe, world=World(), keep=Keep(2), background=True)


def wait(save: Save) -> None:
    save._task.outcome()
    assert not save.busy


def test_the_caller_goes_on_and_agrees_twice(tmp_path: Path, slow: Slow) -> None:
    save = begin(tmp_path, slow)
    assert save.busy and [path.name for path in tmp_path.iterdir()] == ["step_000001.tmp"]
    slow.gate.set()
    wait(save)
    assert not (tmp_path / "step_000001").exists(), "nothing is published before all ranks agreed"
    assert not save.advance()
    wait(save)
    assert save.advance()
    assert verify(tmp_path / "step_000001").step == 1 and (tmp_path / "latest").exists()


def test_whoever_needs_it_waits(tmp_path: Path, slow: Slow) -> None:
    save = begin(tmp_path, slow)
    threading.Timer(0.05, slow.gate.set).start()
    assert save.finish() == tmp_path / "step_000001"
    assert newest_complete(tmp_path).manifest.step == 1


def fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (COMMIT, "_write_own"),
        (COMMIT, "sync_file"),
        (COMMIT, "sha256_file"),
        (Manifest, "write"),
        (COMMIT.os, "rename"),
    ],
)
def test_a_failure_is_an_error_at_the_next_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: Slow, owner: Any, name: str
) -> None:
    slow.gate.set()
    begin(tmp_path, slow).finish()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(owner, name, fail)
    save = begin(tmp_path, slow, step=2)
    with pytest.raises(CheckpointError, match=r"step_000002 was not written \(rank 0: OSError: .*No space left"):
        save.finish()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_fault_of_ours_is_not_taken_for_a_full_disk(tmp_path: Path, slow: Slow) -> None:
    def wrong(folder: Path) -> list[Path]:
        raise KeyError("a bug")

    save = begin(tmp_path, wrong)
    with pytest.raises(KeyError, match="a bug"):
        save.finish()
    slow.gate.set()
    begin(tmp_path, slow, step=2).finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002"], "nothing is left over"


def test_a_save_that_was_left_is_no_checkpoint(tmp_path: Path, slow: Slow) -> None:
    slow.gate.set()
    save = begin(tmp_path, slow)
    wait(save)
    with pytest.raises(CheckpointError, match=r"step_000001.tmp was never completed"):
        newest_complete(tmp_path)
