"""How many threads one training process should take on this machine, with its loader worker beside it.

    python -m benchmarks.threads               # about two minutes on 2 cores

Short runs of the quickstart with 1 thread, 2 threads, and what moemm chooses, in turn; wall time of a step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record
from benchmarks.record import Row

RECIPE = "configs/recipes/quickstart.yaml"
STEPS, ROUNDS = 60, 3
CHOICES = {"1 thread": "1", "2 threads": "2", "chosen by moemm": None}


def seconds_a_step(folder: Path, threads: str | None) -> float:
    """Wall seconds of a step of a fresh run."""
    overrides = [f"--train.steps={STEPS}", f"--train.output={folder}", "--train.baselines=false"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = threads
    command = [sys.executable, "-m", "moemm", "train", RECIPE, *overrides]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return float(summary["seconds"]) / STEPS


def main() -> None:
    """Measure, write results/threads.json, and print the table."""
    began = time.perf_counter()
    times: dict[str, list[float]] = {name: [] for name in CHOICES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            for name, threads in CHOICES.items():
                times[name].append(seconds_a_step(Path(folder) / f"{number}_{threads}", threads))
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(medians["1 thread"], medians["2 threads"])
    rows = [
        Row(case=f"threads: {name}", metric="time of a step", value=median * 1000, unit="ms", better="lower")
        for name, median in medians.items()
    ]
    rows.append(
        Row(
            case="threads: chosen by moemm", metric="time / best choice", value=medians["chosen by moemm"] / best,
            better="lower", target=1.1,
        )
    )  # fmt: skip
    path = record.write("threads", rows, seeds=[0], seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
