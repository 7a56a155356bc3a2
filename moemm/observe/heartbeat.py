"""heartbeat.json of a run folder: where training is, and whether the process that writes it still lives.

Imports neither torch nor numpy: `moemm status` answers at once.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

FILE_NAME = "heartbeat.json"
LONG_S = 600.0
"""Silence that is nothing unusual where no step is being done: an evaluation, a save, the set-up."""
STEPS_OF_SILENCE = 20
"""The same while training, in steps of the usual length, on top of what collectives may take."""
_LATEST = 0.3
"""Weight of the newest beat in the mean length of a step."""
ENDED = ("finished", "stopped", "failed")


class Heartbeat:
    """Writes `path`: by rename, every `every_s` seconds at most, and where a phase begins.

    ranks: of the job. patience_s: what a step may take longer than usual before a collective's timeout ends the job.
    facts: further values for the file. A disk that is full stops no training: the file then stays as it was.
    """

    def __init__(
        self, path: Path, *, ranks: int, every_s: float, patience_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._every_s, self._patience_s, self._clock = path, every_s, patience_s, clock
        self._process = {"host": platform.node(), "pid": os.getpid(), "ranks": ranks, **_identity(os.getpid())}
        self._known: dict[str, Any] = {}
        self._phase, self._written_at = "", float("-inf")
        self._counted: tuple[int, float] | None = None
        self._step_s: float | None = None

    def beat(self, phase: str, **known: Any) -> None:
        """Say where training is. known: step, total_steps and others; what is not said again stays."""
        now = self._clock()
        self._known |= known
        begins, self._phase = phase != self._phase, phase
        if begins or now - self._written_at >= self._every_s:
            self._count(now)
            self._write(now)

    def _count(self, now: float) -> None:
        """The mean time of a step, from the steps between two beats of training."""
        step = self._known.get("step")
        if self._phase != "train" or step is None:
            self._counted = None  # evaluations and saves are no part of a step
            return
        before, self._counted = self._counted, (step, now)
        if before is None or step <= before[0]:
            self._counted = before or self._counted
            return
        latest = (now - before[1]) / (step - before[0])
        self._step_s = latest if self._step_s is None else _LATEST * latest + (1 - _LATEST) * self._step_s

    def _write(self, now: float) -> None:
        self._written_at = now
        quiet_s = LONG_S
        if self._phase == "train":
            quiet_s = self._patience_s + self._every_s + STEPS_OF_SILENCE * (self._step_s or 1.0)
        values = {"phase": self._phase, "time": now, **self._known, "seconds_per_step": self._step_s}
        with suppress(OSError):
            write_atomically(self._path, json.dumps({**values, "quiet_s": quiet_s, **self._process}) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Put `text` into `path` so that a reader sees the old or the new, never a part. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """What the file of a run folder holds; None where there is none that can be read."""
    try:
        values = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("time"), int | float) else None


def is_alive(beat: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote a heartbeat still runs; None where that cannot be known from here."""
    here = _identity(int(beat.get("pid", 0)))
    if not here.get("boot") or not beat.get("boot") or beat.get("host") != platform.node():
        return None
    if here["boot"] != beat["boot"]:
        return False  # the machine was started anew
    if here["namespace"] != beat.get("namespace"):
        return None
    return bool(here["began"] is not None and here["began"] == beat.get("began"))


def _identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one of the same number; {} on a system without /proc.

    boot: of the machine since its start. namespace: of process numbers. began: when the process did, in clock ticks.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return {}
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        # Of proc(5): the state is field 3, the start field 22. A zombie has ended; its parent has not looked yet.
        began = None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        began = None
    return {"boot": boot, "namespace": namespace, "began": began}
