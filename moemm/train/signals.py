"""Ctrl-C and its like: save at the next step boundary, then end with a documented exit code.

| signal | exit code | sent by |
| --- | --- | --- |
| SIGINT | 130 | Ctrl-C; a second one ends the process at once, without a save |
| SIGTERM | 143 | launchers, `kill`, a scheduler's time limit |
| SIGUSR1 | 85 | a SLURM script with --signal=USR1@60, which then requeues the job |
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 85}
_SAME_PRESS_S = 1.0


class StopRequest:
    """The first stop signal that arrived, as a number that ranks can compare; 0 for none."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def handle(self, number: int, _: FrameType | None) -> None:
        """The signal handler."""
        if not self.number:
            self.number, self._since = number, time.monotonic()
            return
        # Under a launcher one Ctrl-C arrives twice: from the terminal, and passed on by the launcher.
        if number == signal.SIGINT and time.monotonic() - self._since > _SAME_PRESS_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle the stop signals while the block runs (main thread only), then put the former handlers back."""
    request = StopRequest()
    former = {number: signal.signal(number, request.handle) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def exit_code(number: int) -> int:
    """The exit code for a stop signal's number."""
    return EXIT_CODES[signal.Signals(number)]
