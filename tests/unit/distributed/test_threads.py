"""Threads of a rank on the CPU: its share of the cores, less the loader's workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moemm.distributed.threads import cpu_threads


@pytest.mark.parametrize(
    ("cores", "local_ranks", "workers", "threads"),
    [(2, 1, 1, 1), (2, 1, 0, 2), (2, 2, 1, 1), (16, 1, 1, 15), (16, 4, 2, 2), (1, 4, 3, 1)],
)
def test_share_of_the_cores(cores: int, local_ranks: int, workers: int, threads: int) -> None:
    assert cpu_threads({}, cores=cores, local_ranks=local_ranks, workers=workers) == threads


def test_the_users_choice_stays() -> None:
    assert cpu_threads({"OMP_NUM_THREADS": "7"}, cores=2, local_ranks=1, workers=1) is None


@pytest.mark.parametrize(("given", "threads"), [(None, max(1, len(os.sched_getaffinity(0)) - 1)), ("2", 2)])
def test_a_process_computes_with_them(given: str | None, threads: int) -> None:
    code = (
        "import torch; from moemm.distributed import World, choose_cpu_threads;"
        "choose_cpu_threads(World(), workers=1); print(torch.get_num_threads())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MKL_"))}
    if given:
        environment["OMP_NUM_THREADS"] = given
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == threads
