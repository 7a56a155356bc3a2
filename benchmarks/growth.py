"""Growth on the real suite: upcycling a dense run, and extending a model by a task with new modalities.

    MOEMM_SUITE=FOLDER python -m benchmarks.growth                   # some 50 minutes on 2 cores, two seeds at a time
    MOEMM_SUITE=FOLDER python -m benchmarks.growth --parts upcycle --seeds 1 --folder RUNS

benchmarks/growth_upcycle.py and growth_extend.py say what is compared. Steps are counted, not seconds, but for the time
of an extension, which is compared with joint training on the same machine.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks import growth_extend, growth_upcycle, record, runs
from benchmarks.record import Matrix, Row

UPCYCLE = Matrix(
    title="upcycling at half of the steps, mean over seeds",
    columns={
        "further steps": growth_upcycle.FURTHER,
        "steps in all": growth_upcycle.SUNK,
        "loss": growth_upcycle.LOSS,
        "score": growth_upcycle.SCORE,
        "less dense": growth_upcycle.GAIN,
    },
    digits=3,
)
EXTEND = Matrix(
    title="extension by a task that the base has not seen, mean over seeds",
    columns={
        "score": "score",
        "/ joint": growth_extend.SHARE,
        "trained": growth_extend.TRAINED,
        "time": growth_extend.TIME,
        "points lost": growth_extend.FORGOTTEN,
        "bits moved": growth_extend.MOVED,
    },
    digits=3,
)


def main(arguments: list[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("upcycle", "extend"), default=("upcycle", "extend"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=growth_extend.TASKS, default=growth_extend.TASKS)
    parser.add_argument("--folder", type=Path, default=None, help="keeps runs, and goes on with those that are there")
    options = parser.parse_args(arguments)
    began, seeds, rows, matrices = time.perf_counter(), range(options.seeds), list[Row](), []
    with runs.two_at_a_time(options.folder) as (folder, pool):
        if "upcycle" in options.parts:
            rows += growth_upcycle.rows_of(list(pool.map(lambda seed: growth_upcycle.one_seed(folder, seed), seeds)))
            matrices.append(UPCYCLE)
        if "extend" in options.parts:
            # By seed, so that no two at a time want the same joint run.
            jobs = [(task, seed) for task in options.tasks for seed in seeds]
            done = dict(zip(seeds, pool.map(lambda seed: _of_seed(folder, options.tasks, seed), seeds), strict=True))
            rows += growth_extend.rows_of({task: [done[seed][task] for seed in seeds] for task, _ in jobs})
            matrices.append(EXTEND)
    record.write("growth", rows, seeds=list(seeds), seconds=time.perf_counter() - began, matrices=matrices)


def _of_seed(folder: Path, tasks: list[str], seed: int) -> dict[str, growth_extend.Result]:
    return {task: growth_extend.one(folder, task, seed) for task in tasks}


if __name__ == "__main__":
    main()
