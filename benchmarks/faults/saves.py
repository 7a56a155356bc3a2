"""Rows 1, 2, 4, 5, 6 and 7: saves that are cut off or fail, checkpoints that are broken, signals, and going on.

A run is a tiny one of two ranks with dropout and a checkpoint every second step. What it must come to is what a run
that nothing happened to came to: the same losses and the same bytes of weights.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.launched import LAUNCHED, judge
from benchmarks.faults.outcome import Outcome, spread
from moemm.checkpoint import newest_complete, verify
from moemm.checkpoint.store import read_weights
from moemm.errors import CheckpointError, LaunchError
from moemm.points import SAVE
from moemm.testing.forked import Nursery, RankResult
from moemm.testing.tiny import tiny_config
from moemm.train.signals import EXIT_CODES

STEPS, SAVED, STAGES = 24, 4, (0, 1, 2, 3)
"""A save of step SAVED is broken; 20 steps follow."""
GO_ON = "stop at each of steps 1-20, resume twice, other world, other ZeRO stage"
SIGNAL = "SIGTERM, SIGINT once and twice, SIGUSR1"
FULL_DISK = "disk full, read-only folder"
DAMAGE = "torn, rotten, swapped, missing checkpoint files"
KILL_AT_RANDOM = "kill -9 at a random time"
KILL_IN_SAVE = "kill -9 at 10 points of a save"
KILLS = list(itertools.product(SAVE, ("0", "1", "all"), STAGES))
"""Row 1: point x victim x ZeRO stage."""
FULL = list(itertools.product(("save.begin", "save.folder", "save.file", "save.written", "save.hashed"), (0, 1)))
"""Row 5: point x rank; each with a full and with a read-only disk."""
SIGNALS: list[tuple[str, str]] = [
    *itertools.product(("term", "int", "usr1"), ("one rank", "all ranks")),
    ("int twice", "one rank"),
]
"""Row 6."""


class Runs:
    """Tiny runs in a folder, and what they must come to, by ZeRO stage."""

    def __init__(self, nursery: Nursery, folder: Path, *, steps: int = STEPS, dropout: float = 0.2) -> None:
        self.nursery, self.folder, self.steps, self._dropout = nursery, folder, steps, dropout
        self._whole: dict[int, tuple[list[float], bytes]] = {}

    def config(self, name: str, stage: int) -> Path:
        """Of a run of this name, which is not there yet."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return tiny_config(
            folder,
            train={"output": str(folder / "run"), "steps": self.steps, "baselines": False, "checkpoint": {"every": 2}},
            model={"dropout": self._dropout},
            deepspeed={"zero_stage": stage, "timeout_s": 20},
        ).path

    def train(self, config: Path, fault: str = "", *more: str, ranks: int = 2) -> list[RankResult]:
        """`moemm train`, with a fault."""
        environ = {"MOEMM_FAULT": fault} if fault else {}
        return self.nursery.moemm(["train", str(config), *more], ranks=ranks, environ=environ, timeout_s=180)

    def whole(self, stage: int) -> tuple[list[float], bytes]:
        """Losses and weights of a run that nothing happened to."""
        if stage not in self._whole:
            config = self.config(f"whole_{stage}", stage)
            assert all(one.returncode == 0 for one in self.train(config))
            self._whole[stage] = came_to(config)
        return self._whole[stage]


def checkpoints(config: Path) -> Path:
    """Folder of the checkpoints of a run."""
    return config.parent / "run" / "checkpoints"


def came_to(config: Path) -> tuple[list[float], bytes]:
    """Losses of all steps, and the weights at the end."""
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]
    weights = read_weights(newest_complete(checkpoints(config)).folder)
    return losses, b"".join(weights[name].numpy().tobytes() for name in sorted(weights))


def _goes_on(runs: Runs, config: Path, stage: int) -> str:
    """Resume; what was wrong with that, empty where it comes to the same and leaves nothing over."""
    left_over = [path.name for path in checkpoints(config).glob("step_*") if path.suffix]
    found = runs.train(config, "", "--resume")
    if any(one.returncode for one in found):
        return f"the resume ended with {[one.returncode for one in found]}: {found[0].output[-800:]}"
    said = " ".join(found[0].output.split())
    if any(f"{name} was never completed" not in said for name in left_over):
        return f"the resume did not name {left_over}"
    if came_to(config) != runs.whole(stage):
        return "the resumed run came to something else"
    names = sorted(path.name for path in checkpoints(config).iterdir())
    expected = ["latest", *(path for path in names if path.startswith("step_") and "." not in path)]
    return "" if names == expected and len(names) == 3 else f"left over: {names}"


def kill_in_save(runs: Runs, count: int) -> Outcome:
    """Row 1: kill -9 at each point of a save, of one rank or all."""
    wrong = []
    cases = spread(KILLS, count)
    for point, victim, stage in cases:
        config = runs.config("killed", stage)
        fault = f"kill:{point}@step={SAVED}" + (f",rank={victim}" if victim != "all" else "")
        found = runs.train(config, fault)
        died = [one.returncode for one in found]
        expected = [-signal.SIGKILL if victim in ("all", str(rank)) else LaunchError.exit_code for rank in (0, 1)]
        text = f"ended with {died}: {found[0].output[-500:]}" if died != expected else _goes_on(runs, config, stage)
        if text:
            wrong.append(f"{fault}, ZeRO {stage}: {text}")
    return Outcome(KILL_IN_SAVE, len(cases), wrong)


def kill_at_random(runs: Runs, count: int) -> Outcome:
    """Row 2: kill -9 of all ranks at a random time after the first step began."""
    wrong, draw = [], random.Random(0)
    for number in range(count):
        stage, seconds = STAGES[number % 4], draw.uniform(0.0, 2.5)
        config = runs.config("random", stage)
        fault = f"kill_later:data@step=1,seconds={seconds:.3f}"
        runs.train(config, fault)
        text = _goes_on(runs, config, stage)
        if text:
            wrong.append(f"{fault}, ZeRO {stage}: {text}")
    return Outcome(KILL_AT_RANDOM, count, wrong)


def damage(runs: Runs, count: int) -> Outcome:
    """Row 4: torn, rotten, swapped and missing files of a checkpoint of two ranks: all found before one is opened."""
    config = runs.config("damaged", 2)
    runs.train(config)
    good = newest_complete(checkpoints(config)).folder
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    wrong, draw = [], random.Random(1)
    kinds: list[Callable[[Path, Path, random.Random], str]] = [_flip, _cut, _swap, _lose, _grow, _overwrite]
    for number in range(count):
        path, other = (good / name for name in draw.sample(files, 2))
        before, others = path.read_bytes(), other.read_bytes()
        text = kinds[number % len(kinds)](path, other, draw)
        try:
            verify(good)
            wrong.append(text)
        except CheckpointError:
            pass
        path.write_bytes(before)
        other.write_bytes(others)
    verify(good)
    return Outcome(DAMAGE, count, wrong)


def _flip(path: Path, other: Path, draw: random.Random) -> str:
    held = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(held)), draw.randrange(8)
    held[place] ^= 1 << bit
    path.write_bytes(held)
    return f"bit {bit} of byte {place} of {path.name}"


def _cut(path: Path, other: Path, draw: random.Random) -> str:
    held = path.read_bytes()
    length = draw.randrange(len(held))
    path.write_bytes(held[:length])
    return f"{path.name} cut to {length} of {len(held)}"


def _swap(path: Path, other: Path, draw: random.Random) -> str:
    held = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(held)
    return f"{path.name} and {other.name} swapped"


def _lose(path: Path, other: Path, draw: random.Random) -> str:
    path.unlink()
    return f"{path.name} lost"


def _grow(path: Path, other: Path, draw: random.Random) -> str:
    path.write_bytes(path.read_bytes() + bytes(draw.randrange(1, 100)))
    return f"{path.name} grown"


def _overwrite(path: Path, other: Path, draw: random.Random) -> str:
    held = bytearray(path.read_bytes())
    first = draw.randrange(len(held))
    held[first : first + 64] = draw.randbytes(len(held[first : first + 64]))
    path.write_bytes(held)
    return f"{path.name} overwritten at {first}"


def full_disk(runs: Runs, count: int) -> Outcome:
    """Row 5: one save fails and training goes on; three in a row end it; the last good checkpoint stays."""
    wrong = []
    cases = spread(FULL, count)
    for number, (point, rank) in enumerate(cases):
        stage, kind = STAGES[number % 4], ("enospc", "erofs")[number // 2 % 2]
        fault = f"{kind}:{point}@rank={rank},step="
        text = _one_failure(runs, f"{fault}4", stage) or _three_failures(runs, fault, stage)
        if text:
            wrong.append(f"{fault}, ZeRO {stage}: {text}")
    return Outcome(FULL_DISK, len(cases), wrong)


def _one_failure(runs: Runs, fault: str, stage: int) -> str:
    config = runs.config("full", stage)
    found = runs.train(config, fault)
    if any(one.returncode for one in found):
        return f"ended with {[one.returncode for one in found]}: {found[0].output[-500:]}"
    if "step_000004 was not written" not in " ".join(found[0].output.split()):
        return "the failure was not told"
    return "" if came_to(config) == runs.whole(stage) else "the run came to something else"


def _three_failures(runs: Runs, fault: str, stage: int) -> str:
    config = runs.config("full", stage)
    found = runs.train(config, ";".join(f"{fault}{step}" for step in (4, 6, 8)))
    if [one.returncode for one in found] != [CheckpointError.exit_code] * 2:
        return f"three failures ended with {[one.returncode for one in found]}: {found[0].output[-500:]}"
    names = sorted(path.name for path in checkpoints(config).iterdir())
    if names != ["latest", "step_000002"]:
        return f"three failures left {names}"
    verify(checkpoints(config) / "step_000002")
    return ""


def stop_by_signal(runs: Runs, count: int) -> Outcome:
    """Row 6: one save at a step boundary and a documented exit code; a second SIGINT ends at once."""
    wrong = []
    cases = spread([*SIGNALS, *LAUNCHED], count)
    for number, (kind, target) in enumerate(cases):
        if isinstance(target, signal.Signals):
            text = judge(runs.folder / f"launched_{number}", kind, target)
        else:
            text = signalled(runs, kind, target, STAGES[number % 4])
        if text:
            wrong.append(f"{kind}, {target}: {text}")
    return Outcome(SIGNAL, len(cases), wrong)


def signalled(runs: Runs, kind: str, target: str, stage: int) -> str:
    """What was wrong with a case of SIGNALS, stopped and gone on from; empty where it went as it must."""
    config, where = runs.config("signal", stage), ",rank=1" if target == "one rank" else ""
    fault = f"{kind.split()[0]}:forward@step=3{where}"
    if kind == "int twice":
        fault += f";sleep:backward@step=3{where},seconds=1.3;int:step@step=3{where}"
    return _stopped(runs.train(config, fault), config, kind) or _goes_on(runs, config, stage)


def _stopped(found: list[RankResult], config: Path, kind: str) -> str:
    codes = [one.returncode for one in found]
    if kind == "int twice":
        return "" if codes == [LaunchError.exit_code, -signal.SIGINT] else f"ended with {codes}"
    number = {"term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}[kind]
    names = sorted(path.name for path in checkpoints(config).iterdir())
    if codes != [EXIT_CODES[number]] * 2 or names != ["latest", "step_000002", "step_000003"]:
        return f"ended with {codes} and {names}: {found[0].output[-500:]}"
    return ""


def go_on(runs: Runs, count: int) -> Outcome:
    """Row 7: stopped at each of steps 1 to 20, and twice; another world size and another ZeRO stage."""
    steps: list[tuple[Any, ...]] = [("stop", (step,), STAGES[step % 4]) for step in range(1, 21)]
    twice: list[tuple[Any, ...]] = [("stop", (5, 13), stage) for stage in STAGES]
    others: list[tuple[Any, ...]] = [("ranks", (7,), stage) for stage in (1, 2, 3)]
    others += [("stage", (7,), stage) for stage in (1, 2, 3)]
    cases = spread([*steps, *twice, *others], count)
    wrong = []
    # Elsewhere without dropout, which ranks draw by themselves.
    elsewhere = Runs(runs.nursery, runs.folder / "elsewhere", steps=runs.steps, dropout=0.0)
    for kind, stops, stage in cases:
        own = runs if kind == "stop" else elsewhere
        config = own.config("stopped", stage)
        for number, step in enumerate(stops):
            own.train(config, f"term:forward@step={step},rank=0", *(["--resume"] if number else []))
        text = _goes_on(own, config, stage) if kind == "stop" else _goes_on_elsewhere(own, config, stage, kind)
        if text:
            wrong.append(f"{kind} at {stops}, ZeRO {stage}: {text}")
    return Outcome(GO_ON, len(cases), wrong)


def _goes_on_elsewhere(runs: Runs, config: Path, stage: int, kind: str) -> str:
    more = ["--deepspeed.zero-stage", str(stage % 3 + 1)] if kind == "stage" else []
    found = runs.train(config, "", "--resume", *more, ranks=1 if kind == "ranks" else 2)
    if any(one.returncode for one in found):
        return f"ended with {[one.returncode for one in found]}: {found[0].output[-300:]}"
    losses, whole = came_to(config)[0], runs.whole(stage)[0]
    far = max(abs(a - b) for a, b in zip(losses, whole, strict=True))
    return "" if far < 1e-5 else f"losses differ by {far}"
