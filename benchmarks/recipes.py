"""Every recipe on the ten core tasks of the suite: equal active parameters, equal steps, several seeds.

    MOEMM_SUITE=FOLDER python -m benchmarks.recipes            # 30 to 45 minutes on 2 cores, two runs at a time
    MOEMM_SUITE=FOLDER python -m benchmarks.recipes --steps 50 --seeds 1 --recipes dense moemm

Each recipe of configs/recipes/ is trained on the tasks of configs/base/core.yaml in place of the quickstart's. A task's
score is accuracy or AUC on its test split; a recipe's is the mean over tasks. `shared + modality` is no recipe but the
default without routed experts. Speed is measured afterwards, one short run at a time, the recipes in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record, runs
from benchmarks.record import Matrix, Row
from benchmarks.runs import Summary, mean_score, row

PUBLISHED = ("skillnet", "highmmt", "limoe", "fusemoe", "flexmoe", "mot", "moma", "multimodn", "lanistr")
BOTH = "shared + modality"
RECIPES = ("dense", *PUBLISHED, BOTH, "moemm")
# HighMMT's groups name modalities; those of the core tasks, by what the signals look like, as in its recipe.
SHARE = [
    ["image", "picture", "video", "motion"],
    ["voice", "audio", "lpc", "speech", "utterance"],
    ["accel", "gyro", "pen", "eeg"],
]
SPEED_STEPS, ROUNDS = 40, 3
TOTAL, ACTIVE, SPEED = "parameters", "active parameters", "tokens/s"


def config(recipe: str, folder: Path, *, suite: Path, steps: int, seed: int) -> Path:
    """A configuration that trains one recipe on the core tasks; its path."""
    output = folder / f"{recipe}_{seed}".replace(" ", "")
    file = runs.ROOT / "configs" / "recipes" / f"{'moemm' if recipe == BOTH else recipe}.yaml"
    values: dict[str, Any] = {
        "base": [str(file), str(runs.CORE)],
        "data": {"root": str(suite), "num_workers": 0},
        "train": {"output": str(output), "seed": seed, "epochs": None, "steps": steps, "batch_size": 64},
    }
    values["train"] |= {"eval_every": 0, "checkpoint": {"every": 0}, "baselines": False, "log_every": 50}
    if recipe == "highmmt":
        groups = [{"kind": "modality", "width": 256, "modalities": names} for names in SHARE]
        values["model"] = {"share": SHARE, "experts": {"groups": [*groups, {"kind": "modality", "width": 256}]}}
    if recipe == BOTH:
        values["model"] = {
            "experts": {"groups": [{"kind": "shared", "width": 128}, {"kind": "modality", "width": 128}]}
        }
    return runs.write_config(output.with_suffix(".yaml"), values)


def train(path: Path) -> Summary:
    """The summary of one run."""
    return runs.train(path.with_suffix(""), str(path))


def speeds(recipes: Sequence[str], suite: Path) -> dict[str, list[float]]:
    """recipe -> tokens/s of each round; one run at a time, on one core."""
    found: dict[str, list[float]] = {recipe: [] for recipe in recipes}
    for number in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            for recipe in recipes:
                summary = train(config(recipe, Path(folder), suite=suite, steps=SPEED_STEPS, seed=number))
                found[recipe].append(summary["tokens_per_second"])
    return found


def rows_of(found: dict[str, list[Summary]], speed: dict[str, list[float]]) -> list[Row]:
    """Per recipe: the mean score with its deviation over seeds, each task's, sizes and median speed."""
    rows = []
    for recipe, summaries in found.items():
        rows.append(row(recipe, "mean of tasks", [mean_score(one) for one in summaries]))
        for task in summaries[0]["tasks"]:
            rows.append(row(recipe, task, [one["tasks"][task]["test"] for one in summaries]))
        for metric, kind in ((TOTAL, "total"), (ACTIVE, "active")):
            rows.append(Row(case=recipe, metric=metric, value=float(summaries[0][f"params_{kind}"]), better="lower"))
        rows.append(Row(case=recipe, metric=SPEED, value=statistics.median(speed[recipe]), unit="tokens/s"))
    for sparse in (name for name in (BOTH, "moemm") if {name, "dense"} <= found.keys()):
        gains = [mean_score(a) - mean_score(b) for a, b in zip(found[sparse], found["dense"], strict=True)]
        rows.append(row(f"{sparse} less dense", "mean of tasks, of each seed", gains, target=0.0))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--folder", type=Path, default=None, help="keeps runs, and goes on with those that are there")
    options = parser.parse_args(arguments)
    suite, began = runs.suite(), time.perf_counter()
    with runs.two_at_a_time(options.folder) as (folder, pool):
        paths = {
            recipe: [
                config(recipe, folder, suite=suite, steps=options.steps, seed=seed) for seed in range(options.seeds)
            ]
            for recipe in options.recipes
        }
        # Seed by seed, so that a run that is cut short has every recipe.
        order = [path for group in zip(*paths.values(), strict=True) for path in group]
        done = dict(zip(order, pool.map(train, order), strict=True))
        found = {recipe: [done[path] for path in group] for recipe, group in paths.items()}
    rows, seconds = rows_of(found, speeds(options.recipes, suite)), time.perf_counter() - began
    tasks = [*next(iter(found.values()))[0]["tasks"]]
    matrices = [
        Matrix(
            title="test score, mean over seeds",
            columns={"mean": "mean of tasks", **{name: name for name in tasks}},
            digits=3,
        ),
        Matrix(title="size and speed", columns={"total": TOTAL, "active": ACTIVE, "tokens/s": SPEED}),
    ]
    record.write("recipes", rows, seeds=list(range(options.seeds)), seconds=seconds, matrices=matrices)


if __name__ == "__main__":
    main()
