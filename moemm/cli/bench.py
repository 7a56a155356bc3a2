"""`moemm bench`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moemm.errors import ConfigError

SOURCE = Path(__file__).parents[2]
MODULES = {"moe": "benchmarks.moe_layer", "kernels": "benchmarks.kernels"}


@dataclass(kw_only=True)
class Bench:
    """Measure on this machine, print a table and write benchmarks/results/. Needs the source folder.

    moe: the experts of a layer against a loop, grouped_mm, Hugging Face, DeepSpeed and Tutel (those that are
    installed), and a dense network: time, extra memory, busy cores; some fifteen minutes. kernels: each op against a
    plain copy of its bytes.
    """

    name: tyro.conf.Positional[Literal["moe", "kernels"]]
    """What to measure."""

    threads: int = 0
    """Threads to use; 0 takes what torch takes. With 1 the figures are CPU time, else wall-clock time."""

    rounds: int = 7
    """Rounds that each median is taken over; large cases of moe end after three when their time is up."""

    def run(self, overrides: Sequence[str]) -> int:
        """Measure; always 0, also where a target is missed."""
        del overrides
        if not (SOURCE / "benchmarks").is_dir():
            raise ConfigError(
                f"moemm bench: the benchmarks are not in {SOURCE}: run it in the source folder, installed with pip "
                "install -e"
            )
        if str(SOURCE) not in sys.path:
            sys.path.insert(0, str(SOURCE))
        threads = ["--threads", str(self.threads)] if self.threads else []
        importlib.import_module(MODULES[self.name]).main([*threads, "--rounds", str(self.rounds)])
        return 0
