"""How many threads a process computes with on the CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from moemm.distributed.environment import World


def cpu_threads(environ: Mapping[str, str], *, cores: int, local_ranks: int, workers: int) -> int | None:
    """Threads for this rank: its share of the cores, less one a loader worker, at least 1; None where the user chose.

    torch takes all cores by default. Threads that wait for a core spin, so that one thread too many costs more than
    one too few: see benchmarks/results/threads.json.
    """
    if "OMP_NUM_THREADS" in environ:
        return None
    return max(1, cores // local_ranks - workers)


def choose_cpu_threads(world: World, *, workers: int) -> None:
    """Set torch's threads by `cpu_threads`, from the cores that this process may use and the ranks on this host."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)
    cores = len(os.sched_getaffinity(0))
    threads = cpu_threads(os.environ, cores=cores, local_ranks=ranks, workers=workers)
    if threads is not None:
        torch.set_num_threads(threads)
