"""What `moemm status` says of the files of a run, and that heartbeats tell a dead process from a slow one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moemm.errors import CheckpointError
from moemm.observe.heartbeat import LONG_S, STEPS_OF_SILENCE, Heartbeat, is_alive, read_heartbeat, write_atomically
from moemm.observe.status import run_status, status_lines


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("name: r\n")
    return tmp_path


def heartbeat(folder: Path, clock: Clock) -> Heartbeat:
    return Heartbeat(folder / "heartbeat.json", ranks=2, every_s=5.0, patience_s=120.0, clock=clock)


def read(folder: Path) -> dict[str, Any]:
    beat = read_heartbeat(folder)
    assert beat is not None
    return beat


def trained(folder: Path, clock: Clock) -> Heartbeat:
    """A run that has done 40 steps of half a second."""
    beat = heartbeat(folder, clock)
    beat.beat("start", total_steps=100)
    beat.beat("train", step=0)
    for step in range(1, 41):
        clock.now += 0.5
        beat.beat("train", step=step)
    return beat


def lines(path: Path, *values: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in values))


def test_beats_are_seldom_but_for_where_a_phase_begins(folder: Path) -> None:
    clock = Clock()
    beat = heartbeat(folder, clock)
    seen = []
    for second, phase in enumerate(["start", *["train"] * 8, "save", "train", "train"]):
        clock.now = 1000.0 + second
        beat.beat(phase, step=second)
        seen.append((read(folder)["phase"], read(folder)["step"]))
    train = [("train", 1)] * 5 + [("train", 6)] * 3
    assert seen == [("start", 0), *train, ("save", 9), ("train", 10), ("train", 10)]
    assert sorted(os.listdir(folder)) == ["config.yaml", "heartbeat.json"]  # nothing is left from writing


def test_the_time_of_a_step_leaves_evaluations_out(folder: Path) -> None:
    clock = Clock()
    beat = trained(folder, clock)
    assert read(folder)["seconds_per_step"] == pytest.approx(0.5)
    assert read(folder)["quiet_s"] == pytest.approx(125 + STEPS_OF_SILENCE * 0.5)
    beat.beat("evaluate")
    assert read(folder)["quiet_s"] == LONG_S
    clock.now += 300
    beat.beat("train", step=41)
    clock.now += 5
    beat.beat("train", step=51)
    assert read(folder)["seconds_per_step"] == pytest.approx(0.5)


def test_a_disk_that_is_full_stops_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    beat = trained(folder, clock)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(folder / "x.prom", "x 1\n")
        clock.now += 10
        beat.beat("train", step=99)
    assert read(folder)["step"] == 40
    assert sorted(os.listdir(folder)) == ["config.yaml", "heartbeat.json"]


def test_a_run_that_goes_on(folder: Path) -> None:
    clock = Clock()
    trained(folder, clock)
    lines(
        folder / "metrics.jsonl",
        {"event": "train", "step": 30, "total_steps": 100, "loss": 2.0, "tokens_per_second": 900.0, "seconds_left": 9},
        {"event": "left_out", "step": 31, "left_out": None},
        {"event": "left_out", "step": 32, "left_out": {"modalities": ["image"], "tasks": []}},
        {"event": "left_out", "step": 33, "left_out": {"modalities": [], "tasks": ["a"]}},
        {"event": "message", "text": "resumed from x"},
        {"event": "message", "text": "step 20  warning: layer 0: image keeps to expert 1\nmore"},
        {"event": "train", "step": 40, "total_steps": 100, "loss": 1.5, "tokens_per_second": 1000.0, "seconds_left": 8},
    )
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 41, "lo')  # is being written
    samples = [{"file": "a.h5", "key": "image", "index": i, "reason": "NaN"} for i in (4, 7)]
    lines(folder / "quarantine.jsonl", *samples)
    for step in (20, 30):
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (folder / "checkpoints" / "step_000040.tmp").mkdir()
    (folder / "checkpoints" / "step_000020" / "manifest.json").write_text("{}")
    os.utime(folder / "checkpoints" / "step_000020" / "manifest.json", (1010.0, 1010.0))
    found = run_status(folder, now=1023.0)
    assert (found["state"], found["phase"], found["ranks"], found["pid"]) == ("running", "train", 2, os.getpid())
    assert (found["step"], found["total_steps"], found["loss"]) == (40, 100, 1.5)
    assert found["last_sign_s"] == pytest.approx(3.0)
    assert found["steps_per_second"] == pytest.approx(2.0) and found["seconds_left"] == pytest.approx(30.0)
    assert found["checkpoint"]["step"] == 20 and found["checkpoint"]["age_s"] == pytest.approx(13.0)
    assert found["quarantine"] == {"count": 2, "newest": samples[1]}
    assert found["alarms"] == {"count": 1, "newest": "step 20  warning: layer 0: image keeps to expert 1"}
    assert (found["skipped_steps"], found["mended_steps"]) == (1, 2)
    text = "\n".join(status_lines(found))
    parts = ["running: train", "3 s ago", "40 of 100 (40%)", "2 steps/s, 1,000 tokens/s, 30 s left", "step 20, 13 s"]
    parts += ["2 samples; newest: a.h5 image 7: NaN", "1 warning; newest: step 20", "1 whole steps, a part of 2"]
    for part in parts:
        assert part in text


def test_silence_and_death_look_different_from_patience(folder: Path) -> None:
    clock = Clock()
    trained(folder, clock)
    assert run_status(folder, now=clock.now + 130)["state"] == "running"
    silent = run_status(folder, now=clock.now + 3 * 3600)
    assert silent["state"] == "looks dead" and silent["seconds_left"] is None
    assert "no sign of life for 3 h 00 min, in train" in silent["reason"] and "may hang" in silent["reason"]
    dead = {**read(folder), "began": 1}  # a later process has this one's number
    (folder / "heartbeat.json").write_text(json.dumps(dead))
    found = run_status(folder, now=clock.now)
    assert found["state"] == "looks dead" and f"its process {os.getpid()}" in found["reason"]
    elsewhere = {**dead, "host": "node07"}
    (folder / "heartbeat.json").write_text(json.dumps(elsewhere))
    assert is_alive(elsewhere) is None
    assert run_status(folder, now=clock.now)["state"] == "running"
    assert "may hang" not in run_status(folder, now=clock.now + 3600)["reason"]


def test_a_killed_process_is_dead_at_once(folder: Path) -> None:
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom moemm.observe.heartbeat import Heartbeat\n"
        "beat = Heartbeat(Path(sys.argv[1]) / 'heartbeat.json', ranks=1, every_s=5.0, patience_s=120.0)\n"
        "beat.beat('train', step=3, total_steps=9)\nprint('on', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "on\n"
    assert run_status(folder)["state"] == "running"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie: nobody has looked yet
    assert run_status(folder)["state"] == "looks dead"
    process.wait()
    process.stdout.close()
    assert run_status(folder)["state"] == "looks dead"


@pytest.mark.parametrize("phase", ["finished", "stopped", "failed"])
def test_ends_are_told_however_long_ago(folder: Path, phase: str) -> None:
    clock = Clock()
    trained(folder, clock).beat(phase, reason="by SIGTERM")
    found = run_status(folder, now=clock.now + 1e6)
    assert (found["state"], found["reason"], found["seconds_left"]) == (phase, "by SIGTERM", None)


def test_runs_without_a_heartbeat(folder: Path) -> None:
    written = (folder / "config.yaml").stat().st_mtime
    assert run_status(folder, now=written + 5)["state"] == "running"
    assert run_status(folder, now=written + 2 * LONG_S)["state"] == "looks dead"
    (folder / "heartbeat.json").write_text('{"time": ')  # nobody can read that
    assert run_status(folder, now=written + 2 * LONG_S)["state"] == "looks dead"
    (folder / "summary.json").write_text('{"steps": 12}')
    found = run_status(folder, now=written + 2 * LONG_S)
    assert (found["state"], found["step"], found["total_steps"]) == ("finished", 12, 12)
    assert "12 of 12" in "\n".join(status_lines(found))


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run folder: it has no config\.yaml"):
        run_status(tmp_path)
