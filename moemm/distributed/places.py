"""Where each rank is, for the others to read when it is gone: which rank, in which phase, after which collective.

Each rank keeps one small file in the run folder mapped into its memory. At each point (moemm/points.py) it notes the
place there, a microsecond; a thread adds a sign of life every second. The file outlives a rank that is killed or
stopped, and any survivor on the same host, or that shares the folder, can read it. Where the run folder cannot be
written a rank tells of itself alone.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moemm.distributed.collectives import gather_objects, last_collective
from moemm.distributed.environment import World
from moemm.errors import LaunchError
from moemm.points import Place, listen, place, unlisten

FOLDER = "ranks"
BEAT_S = 1.0
_WATCHED_S = 2.5
"""How long a survivor looks for signs of life."""
_FORM = struct.Struct("<qqqqd32s64s128s")
_LOST = re.compile(
    r"gloo|NCCL|ProcessGroup|Connection (closed|reset|refused)|[Tt]imed out|[Tt]imeout|Broken pipe|[Ss]ocket"
)
_WAITED = "lost "
"""How the end of a rank begins that waited for another one in vain."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What the file of a rank says. beat: grows while the process runs; at: time.time() of its last point; end: how it
    ended, if it could say so.
    """  # fmt: skip

    pid: int
    number: int
    step: int
    beat: int
    at: float
    name: str
    collective: str
    end: str

    @property
    def seen(self) -> str:
        """Where, for people."""
        after = f", after {self.collective}" if self.collective else ""
        return f"{self.name} of step {self.step}{after}, {max(0.0, time.time() - self.at):.0f} s ago"


class Board:
    """This rank's file, and the reading of the others'. All ranks make it together."""

    def __init__(self, folder: Path, world: World) -> None:
        self._folder, self._world = folder, world
        self._values = Sign(os.getpid(), 0, 0, 0, time.time(), "start", "", "")
        self._map: mmap.mmap | None = None
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with self._path(world.rank).open("w+b") as file:
                file.truncate(_FORM.size)
                self._map = mmap.mmap(file.fileno(), _FORM.size)
        self._beat, self._end = 0, ""
        self(place())
        self._hosts = gather_objects(socket.gethostname())  # from here on every file is that of this job
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._live, name="moemm-board", daemon=True)
        self._thread.start()

    def _path(self, rank: int) -> Path:
        return self._folder / f"{rank:05d}"

    def __call__(self, here: Place) -> None:
        """Note a point of the main thread."""
        if self._map is not None and here is place():
            text = (one.encode() for one in (here.name, last_collective(), self._end))
            _FORM.pack_into(self._map, 0, os.getpid(), here.number, here.step, self._beat, time.time(), *text)

    def _live(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._beat += 1
            if self._map is not None:
                struct.pack_into("<q", self._map, 24, self._beat)

    def end(self, text: str) -> None:
        """Say how this rank ended."""
        self._end = text.splitlines()[0] if text else ""
        if self._map is not None:
            struct.pack_into("<128s", self._map, _FORM.size - 128, self._end.encode()[:128])

    def close(self, *, remove: bool) -> None:
        """Let go of the file. remove: nobody will want to read it."""
        self._closed.set()
        self._thread.join()
        if self._map is not None:
            self._map.close()
            self._map = None
            if remove:
                self._path(self._world.rank).unlink(missing_ok=True)

    def read(self) -> dict[int, Sign]:
        """The signs of the other ranks that can be read, by rank."""
        found = {}
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            with contextlib.suppress(OSError, struct.error):
                *numbers, name, collective, end = _FORM.unpack(self._path(rank).read_bytes()[: _FORM.size])
                text = (one.rstrip(b"\0").decode(errors="replace") for one in (name, collective, end))
                found[rank] = Sign(*numbers, *text)
        return found

    def report(self, error: BaseException) -> str:
        """Who is gone or hangs, in which phase and after which collective; waits some seconds to tell them apart."""
        here = place()
        before = self.read()
        time.sleep(_WATCHED_S)
        after = self.read()
        states = {rank: self._state(rank, before[rank], sign) for rank, sign in after.items() if rank in before}
        gone = {rank: state for rank, state in states.items() if state}
        behind = {} if gone else self._behind(after, here)
        lines = [f"Rank {rank} {state}; last seen in {after[rank].seen}." for rank, state in (gone or behind).items()]
        if not lines:
            lines = ["A rank did not come to a collective; none can be told to be the one."]
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        own = f"{here.name} of step {here.step}, in {last_collective() or 'a collective'}"
        return (
            "\n".join(lines) + f"\n  rank {self._world.rank} waited in {own}: {reason}\n"
            "  to do: look at the end of that rank's own output and at its host (memory, disk, other jobs); start "
            "again with --resume, which goes on from the newest complete checkpoint"
        )

    def _state(self, rank: int, before: Sign, now: Sign) -> str:
        """What is wrong with a rank; empty where it lives, or ended only because another one is gone."""
        if now.end:
            return "" if now.end.startswith(_WAITED) else f"ended ({now.end})"
        letter = self._process(rank, now.pid)
        if letter in ("", "Z", "X"):
            return "is gone (its process ended without a word: killed, crashed, or left)"
        if letter in ("T", "t"):
            return "hangs (its process is stopped)"
        return "hangs, or its host is gone (no sign of life)" if now.beat == before.beat else ""

    def _process(self, rank: int, pid: int) -> str:
        """State of a process of this host as /proc has it, empty where there is none; `?` where it cannot be told."""
        if self._hosts[rank] != self._hosts[self._world.rank] or not Path("/proc/self/stat").exists():
            return "?"
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return ""

    def _behind(self, signs: dict[int, Sign], here: Place) -> dict[int, str]:
        """Ranks that live and have passed fewer points than this one: it waits for them."""
        least = min((sign.number for sign in signs.values() if not sign.end), default=here.number)
        if least >= here.number:
            return {}
        return {rank: "hangs (it lives, but does not go on)" for rank, s in signs.items() if s.number == least}


def lost(error: BaseException) -> bool:
    """Whether an error says that a collective failed."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


@contextmanager
def on_board(folder: Path, world: World) -> Iterator[None]:
    """Keep this rank's place in `folder`/ranks while the block runs. With one process it does nothing.

    Raises LaunchError that names rank, phase and collective in place of the error of a collective that lacks a rank.
    """
    if world.size == 1:
        yield
        return
    board = Board(folder / FOLDER, world)
    listen(board, first=True)  # before a fault that ends this process
    well = False
    try:
        yield
        well = True
    except BaseException as error:
        if lost(error):
            text = board.report(error)
            board.end(_WAITED + text)
            raise LaunchError(text) from error
        board.end(f"{type(error).__name__}: {error}")
        raise
    finally:
        unlisten(board)
        board.close(remove=well)
