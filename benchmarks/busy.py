"""What a step costs when other processes keep the cores busy, in CPU time of its own process.

Threads that wait for one another by spinning burn the time that the others would need: CPU time grows.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def busy_cores() -> Iterator[Callable[[bool], None]]:
    """One busy process a core, stopped at first; the function given lets them go (True) or stops them."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]

    def let(run: bool) -> None:
        for child in children:
            child.send_signal(signal.SIGCONT if run else signal.SIGSTOP)

    try:
        time.sleep(0.3)  # their start is not what is measured
        let(False)
        yield let
    finally:
        for child in children:
            child.kill()
            child.wait()


def growth(steps: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """For each step, round by round: CPU time with the cores shared / alone. The first round warms up."""
    ratios: list[list[float]] = [[] for _ in steps]
    with busy_cores() as let:
        for number in range(rounds + 1):
            for step, found in zip(steps, ratios, strict=True):
                alone = _cpu_seconds(step)
                let(True)
                try:
                    shared = _cpu_seconds(step)
                finally:
                    let(False)
                if number:
                    found.append(shared / alone)
    return ratios


def median_growth(step: Callable[[], object], rounds: int = 7) -> float:
    """The median of growth for one step."""
    return statistics.median(growth([step], rounds)[0])


def _cpu_seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began
