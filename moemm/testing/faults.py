"""Faults on purpose, at the named points of moemm/points.py.

    MOEMM_FAULT="kill:save.rename@step=20,rank=1" moemm train CONFIG
    with armed("enospc:save.file@rank=1,times=3"): ...

Several are separated by `;`. After `@`: `step` (1-based; in a save the steps done), `rank`, `nth` (the how many-eth
pass that fits the step and the rank; 1), `times` (how many passes from then on; 1), `seconds` (of sleep, and until
kill_later; 3600).
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from moemm.config.suggest import did_you_mean
from moemm.errors import ConfigError
from moemm.points import ENVIRONMENT, POINTS, Place, listen, unlisten


class FaultError(Exception):
    """What the kind `raise` raises: no MoemmError, because it stands for a bug."""


def _signal(number: int) -> Callable[[Fault], None]:
    return lambda _: os.kill(os.getpid(), number)


def _system(number: int) -> Callable[[Fault], None]:
    def fail(fault: Fault) -> None:
        raise OSError(number, os.strerror(number), fault.point)

    return fail


def _leave(fault: Fault) -> None:
    sys.stdout.flush()
    os._exit(0)


def _raise(fault: Fault) -> None:
    raise FaultError(f"the fault that was asked for: {fault.text}")


def _crash(fault: Fault) -> None:
    ctypes.string_at(0)


def _kill_later(fault: Fault) -> None:
    timer = threading.Timer(fault.seconds, lambda: os.kill(os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


KINDS: dict[str, Callable[[Fault], None]] = {
    "kill": _signal(signal.SIGKILL),
    "kill_later": _kill_later,
    "stop": _signal(signal.SIGSTOP),
    "term": _signal(signal.SIGTERM),
    "int": _signal(signal.SIGINT),
    "usr1": _signal(signal.SIGUSR1),
    "exit0": _leave,
    "raise": _raise,
    "segfault": _crash,
    "enospc": _system(errno.ENOSPC),
    "erofs": _system(errno.EROFS),
    "sleep": lambda fault: time.sleep(fault.seconds),
}
"""What may happen at a point: signals to this process (kill_later: SIGKILL after some seconds), an end with code 0, an
exception, a crash, a disk that is full or read-only, a long wait."""
_OPTIONS = ("step", "rank", "nth", "times", "seconds")


@dataclass(slots=True)
class Fault:
    """One fault. step, rank: None for any. passes: how often its point was passed where both fit."""

    text: str
    kind: str
    point: str
    step: int | None = None
    rank: int | None = None
    nth: int = 1
    times: int = 1
    seconds: float = 3600.0
    passes: int = field(default=0, init=False)

    def __call__(self, place: Place) -> None:
        """Happen, if it is time. Listens to moemm.points."""
        if place.name != self.point or (self.step is not None and place.step != self.step):
            return
        if self.rank is not None and int(os.environ.get("RANK", "0")) != self.rank:
            return
        self.passes += 1
        if self.nth <= self.passes < self.nth + self.times:
            KINDS[self.kind](self)


_armed: list[Fault] = []


def parse(text: str) -> list[Fault]:
    """`KIND:POINT@key=value,...;...` -> faults. Raises ConfigError that names what is unknown and what is known."""
    return [_parse_one(part.strip()) for part in text.split(";") if part.strip()]


def _parse_one(text: str) -> Fault:
    head, _, tail = text.partition("@")
    kind, _, point = head.partition(":")
    for given, known, what in ((kind, list(KINDS), "kind"), (point, list(POINTS), "point")):
        if given not in known:
            raise _refusal(text, f"no {what} {given!r}{did_you_mean(given, known)}", f"{what}s: {', '.join(known)}")
    fault = Fault(text, kind, point)
    for pair in filter(None, tail.split(",")):
        key, _, value = pair.partition("=")
        try:
            if key not in _OPTIONS:
                raise ValueError
            setattr(fault, key, float(value) if key == "seconds" else int(value))
        except ValueError:
            raise _refusal(text, f"cannot read {pair!r}", f"{', '.join(_OPTIONS)}, each = a number") from None
    return fault


def _refusal(text: str, found: str, allowed: str) -> ConfigError:
    return ConfigError(
        f"{ENVIRONMENT}: {text!r}: {found}\n  allowed: KIND:POINT@key=value,...; {allowed}\n"
        f"  to do: correct it, or unset {ENVIRONMENT} to train without faults"
    )


def arm(text: str, *, aloud: bool = False) -> None:
    """Let these faults happen from now on, in place of those armed before. aloud: say so. Raises as `parse` does."""
    faults = parse(text)
    disarm()
    for fault in faults:
        _armed.append(fault)
        listen(fault)
    if aloud and os.environ.get("RANK", "0") == "0":
        print(f"{ENVIRONMENT} is set, so this run will be broken on purpose: {text}", file=sys.stderr, flush=True)


def disarm() -> None:
    """No fault happens any more."""
    while _armed:
        unlisten(_armed.pop())


@contextmanager
def armed(text: str) -> Iterator[list[Fault]]:
    """`arm` while the block runs."""
    arm(text)
    try:
        yield list(_armed)
    finally:
        disarm()
