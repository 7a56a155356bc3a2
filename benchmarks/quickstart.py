"""The quickstart over three seeds, sparse against dense of equal active parameters, scikit-learn beside them.

    python -m benchmarks.quickstart            # about half an hour on 2 cores

The runs go two at a time, a core each; the first seed's sparse run comes last, has the machine to itself, and its time
is the one stated.
"""

from __future__ import annotations

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import record, runs
from benchmarks.record import Row
from benchmarks.runs import Summary, mean_score, row

RECIPE = str(runs.ROOT / "configs" / "recipes" / "quickstart.yaml")
TARGETS = {"digits_hard": 0.93, "avclip": 0.85, "watch": 0.82, "vowels": 0.97, "adult": 0.89, "reviews": 0.82}
SECONDS = 360.0


def train(folder: Path, *, moe: str, seed: int, alone: bool = False) -> Summary:
    """The summary of one run; alone, it may take every core."""
    output = folder / f"{moe}_{seed}"
    command = [RECIPE, "--model.moe", moe, "--train.seed", str(seed), "--train.output", str(output)]
    return runs.train(output, *command, one_core=not alone)


def train_all(folder: Path, pool: ThreadPoolExecutor, seeds: list[int]) -> dict[str, list[Summary]]:
    """moe -> summaries, in the order of the seeds."""
    timed = ("sparse", seeds[0])
    rest = [(moe, seed) for seed in seeds for moe in ("sparse", "dense") if (moe, seed) != timed]
    done = list(pool.map(lambda job: train(folder, moe=job[0], seed=job[1]), rest))
    found: dict[str, list[Summary]] = {"sparse": [], "dense": []}
    found["sparse"].append(train(folder, moe="sparse", seed=seeds[0], alone=True))
    for (moe, _), summary in zip(rest, done, strict=True):
        found[moe].append(summary)
    return found


def rows_of(found: dict[str, list[Summary]]) -> list[Row]:
    """A row a task and figure: sparse against its target, dense, scikit-learn; then time and size."""
    rows = []
    for task, target in TARGETS.items():
        scores = {moe: [run["tasks"][task]["test"] for run in some] for moe, some in found.items()}
        metric = found["sparse"][0]["tasks"][task]["metric"]
        for moe, values in scores.items():
            goal = target if moe == "sparse" else None
            rows.append(row(f"{task}, {moe}", f"test {metric}", values, target=goal))
        rows.append(Row(case=f"{task}, scikit-learn", metric=f"test {metric}", value=baseline(found, task)))
    means = {moe: [mean_score(run) for run in some] for moe, some in found.items()}
    rows.append(row("mean of tasks, dense", "test score", means["dense"]))
    rows.append(row("mean of tasks, sparse", "test score", means["sparse"], target=statistics.mean(means["dense"])))
    mean_baseline = statistics.mean(baseline(found, task) for task in TARGETS)
    rows.append(Row(case="mean of tasks, scikit-learn", metric="test score", value=mean_baseline))
    first = found["sparse"][0]
    rows.append(Row(case="training", metric="time", value=first["seconds"], unit="s", better="lower", target=SECONDS))
    rows.append(Row(case="training", metric="throughput", value=first["tokens_per_second"], unit="tokens/s"))
    for moe, some in found.items():
        for kind in ("total", "active"):
            value = float(some[0][f"params_{kind}"])
            rows.append(Row(case=f"model, {moe}", metric=f"{kind} parameters", value=value, better="lower"))
    return rows


def baseline(found: dict[str, list[Summary]], task: str) -> float:
    """scikit-learn's test score, the same in every run."""
    return float(found["sparse"][0]["tasks"][task]["baseline"]["test"])


def main() -> None:
    """Run, write results/quickstart.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    arguments = parser.parse_args()
    with runs.two_at_a_time(arguments.folder) as (folder, pool):
        found = train_all(folder, pool, arguments.seeds)
    path = record.write(
        "quickstart",
        rows_of(found),
        seeds=arguments.seeds,
        seconds=sum(run["seconds"] for some in found.values() for run in some),
    )
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
