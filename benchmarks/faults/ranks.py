"""Rows 3 and 9: a rank that dies or hangs; the others must end in time and name it.

Ranks are forked, so that times are those of the run and not of imports.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.outcome import Outcome, spread
from moemm.errors import LaunchError
from moemm.testing.forked import Nursery, RankResult
from moemm.testing.tiny import tiny_config

PHASES = ("data", "forward", "dispatch", "backward", "harmonize", "step", "log")
DIE = "death of a rank: SIGKILL, SIGSTOP, exit(0), exception, segfault"
KILL_IN_PHASE = "kill -9 of a rank in data, forward, dispatch, backward, harmonize, step, log"
KILLED = list(itertools.product(PHASES, (0, 1)))
"""Row 3: phase x victim."""
DEATHS = list(itertools.product(("kill", "stop", "exit0", "raise", "segfault"), ("forward", "step", "save.file")))
"""Row 9: kind x phase; the victim is rank 0 or 1 in turn."""
TIMEOUT_S, MORE_S = 10, 30
STAGES = (0, 1, 2, 3)


def write_config(folder: Path, stage: int, **sections: dict[str, Any]) -> Path:
    """A tiny run that settles conflicts, saves every second step and reports each; the file of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    train = {"output": str(folder / "run"), "steps": 8, "baselines": False, "checkpoint": {"every": 2}}
    return tiny_config(
        folder,
        train={**train, **sections.pop("train", {})},
        objectives={"masked": {"weight": 1.0}, "similarity": {"weight": 1.0}},
        harmonize={"method": "upgrad"},
        deepspeed={"zero_stage": stage, "timeout_s": TIMEOUT_S},
        **sections,
    ).path


def kill_in_phase(nursery: Nursery, folder: Path, count: int) -> Outcome:
    """Row 3: kill -9 in a phase; the other rank ends within 30 s, non-zero, naming phase and rank."""
    cases = spread(KILLED, count)
    wrong = []
    for number, (phase, victim) in enumerate(cases):
        config = write_config(folder / f"killed_{number}", STAGES[number % 4])
        fault = f"kill:{phase}@step=3,rank={victim}"
        found = nursery.moemm(["train", str(config)], environ={"MOEMM_FAULT": fault}, timeout_s=120)
        wrong += _judge(fault, found, victim, phase)
        shutil.rmtree(config.parent)
    return Outcome(KILL_IN_PHASE, len(cases), wrong)


def die(nursery: Nursery, folder: Path, count: int, *, of: Sequence[tuple[str, str]] = DEATHS) -> Outcome:
    """Row 9: the job ends within its timeout + 30 s and names the rank."""
    cases = spread(of, count)
    wrong = []
    for number, (kind, phase) in enumerate(cases):
        victim = number % 2
        config = write_config(folder / f"died_{number}", STAGES[number % 4])
        fault = f"{kind}:{phase}@step={4 if phase.startswith('save') else 3},rank={victim}"
        found = nursery.moemm(["train", str(config)], environ={"MOEMM_FAULT": fault}, timeout_s=120)
        wrong += _judge(fault, found, victim, phase)
        shutil.rmtree(config.parent)
    return Outcome(DIE, len(cases), wrong)


def _judge(fault: str, found: list[RankResult], victim: int, phase: str) -> list[str]:
    other = found[1 - victim]
    said = re.search(rf"Rank {victim} (is gone|hangs|ended).*last seen in {phase} of step", other.output)
    ended = min(found[victim].seconds, other.seconds) if fault.split(":")[0] != "stop" else 0.0
    late = other.seconds - ended > (TIMEOUT_S + MORE_S + 20 if not ended else MORE_S)
    if other.returncode == LaunchError.exit_code and said and not late:
        return []
    return [f"{fault}: exit {other.returncode} after {other.seconds:.0f} s: {other.output[-600:]}"]
