from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from moemm.train import signals
from moemm.train.signals import exit_code, stop_requests


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 85)])
def test_first_signal_is_noted_and_handlers_are_put_back(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.number == 0
        os.kill(os.getpid(), number)
        assert stop.number == number
        assert exit_code(stop.number) == code
    assert signal.getsignal(number) is before


def test_one_press_that_arrives_twice_counts_once() -> None:
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes it on; this process goes on to save
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGINT


def test_second_press_ends_at_once() -> None:
    code = (
        "import os, signal, time\n"
        "from moemm.train.signals import stop_requests\n"
        f"wait = {signals._SAME_PRESS_S + 0.1}\n"
        "with stop_requests():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(wait)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50).returncode == -signal.SIGINT
