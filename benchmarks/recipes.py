"""Every recipe on the ten core tasks of the suite: equal active parameters, equal steps, several seeds.

    MOEMM_SUITE=FOLDER python -m benchmarks.recipes            # about an hour on 2 cores, two runs at a time
    MOEMM_SUITE=FOLDER python -m benchmarks.recipes --steps 50 --seeds 1 --recipes dense moemm

Each recipe of configs/recipes/ is trained on the tasks of configs/base/core.yaml in place of the quickstart's. A task's
score is accuracy or AUC on its test split; a recipe's is the mean over tasks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from benchmarks.record import Matrix, Row

CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED = ("skillnet", "highmmt", "limoe", "fusemoe", "flexmoe", "mot", "moma", "multimodn", "lanistr")
RECIPES = ("dense", *PUBLISHED, "moemm")
# HighMMT's groups name modalities; those of the core tasks, by what the signals look like, as in its recipe.
SHARE = [
    ["image", "picture", "video", "motion"],
    ["voice", "audio", "lpc", "speech", "utterance"],
    ["accel", "gyro", "pen", "eeg"],
]
TOTAL, ACTIVE, SPEED = "parameters", "active parameters", "tokens/s"
Summary = dict[str, Any]


def config(recipe: str, folder: Path, *, suite: Path, steps: int, seed: int) -> Path:
    """A configuration that trains one recipe on the core tasks; its path."""
    output = folder / f"{recipe}_{seed}"
    values: dict[str, Any] = {
        "base": [str(CONFIGS / "recipes" / f"{recipe}.yaml"), str(CONFIGS / "base" / "core.yaml")],
        "data": {"root": str(suite), "num_workers": 0},
        "train": {"output": str(output), "seed": seed, "epochs": None, "steps": steps, "batch_size": 64},
    }
    values["train"] |= {"eval_every": 0, "checkpoint": {"every": 0}, "baselines": False, "log_every": 50}
    if recipe == "highmmt":
        groups = [{"kind": "modality", "width": 256, "modalities": names} for names in SHARE]
        values["model"] = {"share": SHARE, "experts": {"groups": [*groups, {"kind": "modality", "width": 256}]}}
    path = folder / f"{recipe}_{seed}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train(path: Path) -> Summary:
    """The summary of one run in a process of its own."""
    output = path.with_suffix("")
    if not (output / "summary.json").exists():
        command = [sys.executable, "-W", "ignore", "-m", "moemm", "train", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    summary: Summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    print(path.stem, round(score(summary), 4), f"{summary['seconds']:.0f} s", flush=True)
    return summary


def score(summary: Summary) -> float:
    """Mean over tasks of the test metric; all are accuracies or areas under a curve."""
    return statistics.mean(task["test"] for task in summary["tasks"].values())


def rows_of(runs: dict[str, list[Summary]]) -> list[Row]:
    """Per recipe: the mean score with its deviation over seeds, each task's, sizes and speed."""
    rows = []
    for recipe, summaries in runs.items():
        rows.append(_row(recipe, "mean of tasks", [score(one) for one in summaries]))
        for task in summaries[0]["tasks"]:
            rows.append(_row(recipe, task, [one["tasks"][task]["test"] for one in summaries]))
        for metric, kind in ((TOTAL, "total"), (ACTIVE, "active")):
            rows.append(Row(case=recipe, metric=metric, value=float(summaries[0][f"params_{kind}"]), better="lower"))
        rows.append(_row(recipe, SPEED, [one["tokens_per_second"] for one in summaries], unit="tokens/s"))
    if {"moemm", "dense"} <= runs.keys():
        gains = [score(a) - score(b) for a, b in zip(runs["moemm"], runs["dense"], strict=True)]
        rows.append(_row("moemm less dense", "mean of tasks", gains, target=0.0))
    return rows


def _row(case: str, metric: str, values: list[float], *, unit: str = "", target: float | None = None) -> Row:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    value = statistics.mean(values)
    return Row(case=case, metric=metric, value=value, deviation=deviation, unit=unit, target=target)


def main(arguments: list[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--folder", type=Path, default=None, help="keeps runs, and goes on with those that are there")
    options = parser.parse_args(arguments)
    suite = os.environ.get("MOEMM_SUITE")
    if not suite:
        raise SystemExit("set MOEMM_SUITE to the folder of the suite's files (digits_hard.h5, avclip.h5 ...)")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(max_workers=2) as pool:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        paths = {
            recipe: [
                config(recipe, folder, suite=Path(suite).resolve(), steps=options.steps, seed=seed)
                for seed in range(options.seeds)
            ]
            for recipe in options.recipes
        }
        # Seed by seed, so that a run that is cut short has every recipe.
        order = [path for group in zip(*paths.values(), strict=True) for path in group]
        done = dict(zip(order, pool.map(train, order), strict=True))
        runs = {recipe: [done[path] for path in group] for recipe, group in paths.items()}
    rows, seconds = rows_of(runs), time.perf_counter() - began
    tasks = [*next(iter(runs.values()))[0]["tasks"]]
    matrices = [
        Matrix(
            title="test score, mean over seeds", columns={"mean": "mean of tasks", **{name: name for name in tasks}}
        ),
        Matrix(title="size and speed", columns={"total": TOTAL, "active": ACTIVE, "tokens/s": SPEED}),
    ]
    record.write("recipes", rows, seeds=list(range(options.seeds)), seconds=seconds, matrices=matrices)


if __name__ == "__main__":
    main()
