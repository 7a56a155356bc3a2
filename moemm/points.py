"""Named points that a rank passes: where others look for it when it is gone, and where a test breaks it on purpose.

A point is one call, `point("forward", step=5)`. It notes the place, some hundred nanoseconds, and does nothing else
unless something listens: the board that other ranks read (distributed/places.py), or a fault (testing/faults.py).
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

SAVE = (
    "save.begin",
    "save.folder",
    "save.file",
    "save.written",
    "save.hashed",
    "save.manifest",
    "save.after_manifest",
    "save.rename",
    "save.renamed",
    "save.latest",
)
"""In a save: at its start; the folder stands; after each file; all files of this rank are written; synced and hashed;
before the manifest; after it; before the folder gets its name; after it; verified, before `latest` and pruning."""
POINTS = ("start", "data", "forward", "dispatch", "backward", "harmonize", "step", "log", "evaluate", *SAVE)
"""Every point. dispatch: before tokens go to experts. harmonize: where conflicts of losses are settled."""
ENVIRONMENT = "MOEMM_FAULT"


class Place(NamedTuple):
    """The last point that this process passed. step: 1-based step of training; since: time.monotonic(); number: of
    points passed.
    """  # fmt: skip

    name: str = "start"
    step: int = 0
    since: float = 0.0
    number: int = 0


Listener = Callable[[Place], None]
_place = Place()
_listeners: list[Listener] = []


def point(name: str, *, step: int | None = None) -> None:
    """Pass the point `name`, one of POINTS. step: from here on (1-based); the last one that was given, if not given."""
    global _place
    here = Place(name, _place.step if step is None else step, time.monotonic(), _place.number + 1)
    if threading.current_thread() is threading.main_thread():  # a save in the background is not where a rank is
        _place = here
    for listener in _listeners:
        listener(here)


def place() -> Place:
    """Where this process is."""
    return _place


def listen(listener: Listener, *, first: bool = False) -> None:
    """Call `listener` at each point from now on, behind those that listen already, or before them."""
    _listeners.insert(0 if first else len(_listeners), listener)


def unlisten(listener: Listener) -> None:
    """Undo `listen`; nothing where it does not listen."""
    if listener in _listeners:
        _listeners.remove(listener)


def arm_from_environment() -> None:
    """Arm the faults that MOEMM_FAULT asks for, if it is set. Raises ConfigError as testing.faults.parse does.

    By name, because nothing in moemm imports its test helpers: without the variable they are not even loaded.
    """
    text = os.environ.get(ENVIRONMENT)
    if text:
        importlib.import_module("moemm.testing.faults").arm(text, aloud=True)
