"""Work in a process of its own: what it may take, and how it ends."""

from __future__ import annotations

import time

import pytest

from moemm.data.apart import Stopped, run_apart


def _spin() -> None:
    while True:
        pass


def test_waiting_is_not_working() -> None:
    """On a busy machine a good file was refused, because its reader waited for a core longer than it may compute."""
    assert run_apart(lambda: time.sleep(0.5) or 7, seconds=0.2) == 7


def test_what_never_ends_is_ended() -> None:
    with pytest.raises(Stopped, match=r"no end after 1 seconds?"):
        run_apart(lambda: time.sleep(60), seconds=0.2)
    with pytest.raises(Stopped, match="no end after 1 seconds of processor time"):
        run_apart(_spin, seconds=1.0)
