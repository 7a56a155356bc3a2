"""Time on a CUDA device, and what the GPU benchmarks share: options, rows that were not measured, the table.

With --device cpu the same code runs on the wall clock, to be tried out; nothing is written then.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.record import Row

FLUSH_BYTES = 512 * 2**20
"""Written between repetitions: more than any L2 cache, and longer than it takes Python to launch the next op."""


class Clock:
    """Seconds of a call on a device, by events there."""

    def __init__(self, device: str, *, flush: bool):
        self.cuda = device == "cuda"
        size = FLUSH_BYTES if self.cuda else 2**10
        self._other = torch.empty(size, dtype=torch.uint8, device=device) if flush else None

    def seconds(self, call: Callable[[], object]) -> float:
        """One call; what other calls left in the caches is flushed first, where that was asked for."""
        if self._other is not None:
            self._other.fill_(1)
        if not self.cuda:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def typical(self, call: Callable[[], object], *, rounds: int, warm_up: int = 5) -> tuple[float, float]:
        """Median and deviation over rounds, after some that do not count."""
        took = [self.seconds(call) for _ in range(warm_up + rounds)][warm_up:]
        return statistics.median(took), statistics.pstdev(took)


def copy_bandwidth(clock: Clock, device: str, *, size: int, rounds: int) -> float:
    """Bytes a second, read and written, of copying `size` bytes to another place of the same device."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / clock.typical(lambda: target.copy_(source), rounds=rounds)[0]


def options(doc: str | None, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line of a GPU benchmark. Ends with a message where --device cuda has no device."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny shapes, to try the code")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--unmeasured", action="store_true", help="write the rows without values, for want of a GPU")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not chosen.unmeasured and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device: run this on a machine with one (benchmarks/gpu/run.sh), or try the code with "
            "--device cpu, which writes nothing"
        )
    return chosen


def finish(name: str, rows: Sequence[Row], chosen: argparse.Namespace, *, seconds: float) -> None:
    """Print the rows; write results/NAME.json, and a copy to $OUT where that is set, unless the CPU stood in."""
    from rich.console import Console
    from rich.table import Table

    from benchmarks.tables import HEADER, cells

    table = Table(*HEADER)
    for row in rows:
        table.add_row(*cells(record.as_dict(row)))
    Console(width=None if os.environ.get("COLUMNS") else 140).print(table)
    if chosen.device == "cpu" and not chosen.unmeasured:
        return
    path = record.write(name, rows, seeds=[0], seconds=seconds)
    if os.environ.get("OUT"):
        shutil.copy(path, Path(os.environ["OUT"]) / path.name)
