"""Runs a function in a process of its own, limited in time and memory.

libhdf5 parses what a file's metadata says, and a few changed bytes can send it round in circles or make it crash (one
bit in the heap that holds attributes is enough for an endless loop in HDF5 2.0). That then ends a child, not the run.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from moemm.data.limits import GIB
from moemm.errors import DataError

T = TypeVar("T")
_EXTRA_BYTES = GIB
_PATIENCE = 6.0
"""Wall-clock seconds for a second of processor time: others may want the cores, and a disk may be far away."""
_MEMORY_USED = "/proc/self/statm"
_READ_BYTES = 1 << 20


class Stopped(Exception):
    """The child did not answer; the text says how it ended."""


def run_apart(function: Callable[[], T], *, seconds: float) -> T:
    """What `function` returns, computed in a fork. Its value must be picklable.

    Raises DataError where the function does; Stopped where it takes longer than `seconds` of processor time or
    _PATIENCE times as long by the clock, crashes, or raises anything else.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child starts none
        child = os.fork()
    if child == 0:
        _work(function, writer, seconds)
    os.close(writer)
    try:
        data = _receive(reader, time.monotonic() + _PATIENCE * seconds)
        if data is None:
            raise Stopped(f"no end after {_PATIENCE * seconds:.0f} seconds")
    finally:
        os.close(reader)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        raise Stopped(f"no end after {seconds:.0f} seconds of processor time")
    return _answer(data, status)


def _answer(data: bytes, status: int) -> Any:
    try:
        kind, value = pickle.loads(data)
    except (EOFError, pickle.UnpicklingError, ValueError):
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
        raise Stopped(f"a crash ({ended})") from None
    if kind == "refused":
        raise DataError(value)
    if kind == "failed":
        raise Stopped(value)
    return value


def _receive(reader: int, deadline: float) -> bytes | None:
    """All that the child sends; None where it does not end in time."""
    parts: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(reader, _READ_BYTES)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _work(function: Callable[[], Any], writer: int, seconds: float) -> NoReturn:
    """The child's life: it must not return, print, or run what the parent planned for its own end."""
    try:
        faulthandler.disable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _limit(seconds)
        try:
            answer: tuple[str, Any] = ("value", function())
        except DataError as error:
            answer = ("refused", str(error))
        except BaseException as error:
            answer = ("failed", f"{type(error).__name__}: {error}")
        data = memoryview(pickle.dumps(answer))
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def _limit(seconds: float) -> None:
    """Bounds on processor time and on memory beyond what the parent has; no core dumps."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: int(seconds) + 1}
    if os.path.exists(_MEMORY_USED):
        with open(_MEMORY_USED, encoding="ascii") as file:
            limits[resource.RLIMIT_AS] = int(file.read().split()[0]) * resource.getpagesize() + _EXTRA_BYTES
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (value, hard))
