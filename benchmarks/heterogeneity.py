"""Modality experts shared by measured heterogeneity, against random groups of the same sizes, on the ten core tasks.

    MOEMM_SUITE=FOLDER python -m benchmarks.heterogeneity            # about 20 minutes on 2 cores

Every run has the same model but for who shares: as many experts, as many parameters. Two runs at a time, a core each.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import record
from benchmarks.record import Row
from moemm.analyze import Subject, Wanted, analyze_heterogeneity, regroup
from moemm.config import LoadedConfig, load_config, save_config
from moemm.train.setup import learn_modalities

TASKS = ("digits_hard", "avclip", "stamps", "match", "watch", "eeg", "pbc", "reviews", "actions", "vowels")
RENAME = {
    "digits_hard": {"audio": "voice", "image": "digit"},
    "match": {"speech": "phrase"},
    "reviews": {"record": "customer"},
    "actions": {"video": "motion"},
}
"""Modalities that another task has in another shape."""
Groups = list[tuple[str, ...]]
LOWER = {"rmse", "mae"}


def recipe(folder: Path, *, steps: int) -> LoadedConfig:
    """The ten tasks with half the width shared and half by modality; no routed experts, so that groups are all."""
    suite = os.environ.get("MOEMM_SUITE")
    if not suite:
        raise SystemExit("set MOEMM_SUITE to the folder that holds " + ", ".join(f"{name}.h5" for name in TASKS))
    tasks = [{"name": name, "file": f"{name}.h5", "rename": RENAME.get(name, {})} for name in TASKS]
    values = {
        "name": "heterogeneity",
        "data": {"root": str(Path(suite).resolve()), "tasks": tasks, "temperature": 2.0, "num_workers": 0},
        "model": {"experts": {"groups": [{"kind": "shared", "width": 64}, {"kind": "modality", "width": 64}]}},
        "train": {"steps": steps, "batch_size": 32, "lr": 2e-3, "weight_decay": 0.1, "baselines": False},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_config(path)


def random_groups(names: Sequence[str], like: Groups, *, seed: int) -> Groups:
    """Groups of the same sizes as `like`, filled at random."""
    order = [names[number] for number in np.random.default_rng(seed).permutation(len(names))]
    ends = np.cumsum([len(group) for group in like]).tolist()
    return [tuple(order[end - len(group) : end]) for group, end in zip(like, ends, strict=True)]


def train(path: Path, output: Path, seed: int) -> dict[str, Any]:
    """The summary of one run in a process of its own."""
    command = [sys.executable, "-m", "moemm", "train", str(path), "--train.seed", str(seed)]
    command += ["--train.output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    print(output.name, round(mean_score(summary), 4), flush=True)
    return summary


def mean_score(summary: dict[str, Any]) -> float:
    """Mean of the test scores of all tasks; all of them are better when higher."""
    assert not {task["metric"] for task in summary["tasks"].values()} & LOWER
    return statistics.mean(task["test"] for task in summary["tasks"].values())


def rows_of(found: dict[str, list[dict[str, Any]]]) -> list[Row]:
    """Mean over seeds of each grouping, measured against random; then the tasks one by one."""
    means = {case: [mean_score(run) for run in runs] for case, runs in found.items()}
    chance = [statistics.mean(values) for case, values in means.items() if case != "measured"]
    measured = statistics.mean(means["measured"])
    rows = [row("mean of tasks, measured groups", means["measured"], target=statistics.mean(chance))]
    rows += [row(f"mean of tasks, {case}", values) for case, values in means.items() if case != "measured"]
    rows.append(row("mean of tasks, random groups", chance))
    beaten = sum(measured > value for value in chance) / len(chance)
    rows.append(Row(case="random groups that measured groups beat", metric="share", value=beaten, target=0.5))
    for task in found["measured"][0]["tasks"]:
        for kind in ("measured", "random"):
            runs = [run for case, some in found.items() if case.startswith(kind) for run in some]
            rows.append(row(f"{task}, {kind} groups", [run["tasks"][task]["test"] for run in runs]))
    sizes = sorted({float(run["params_total"]) for runs in found.values() for run in runs})
    assert len(sizes) == 1, "groupings of other sizes"
    rows.append(Row(case="every grouping", metric="parameters", value=sizes[0], better="lower"))
    return rows


def row(case: str, values: list[float], *, target: float | None = None) -> Row:
    """Mean and deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Row(case=case, metric="test score", value=statistics.mean(values), deviation=deviation, target=target)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """case -> summaries, in the order of the seeds."""
    loaded = recipe(folder, steps=arguments.steps)
    subject = Subject(loaded, *learn_modalities(loaded))
    wanted = Wanted(groups=arguments.groups, samples=arguments.samples)
    values, _, _ = analyze_heterogeneity(subject, wanted, tell=lambda line: print(line, flush=True))
    cases: dict[str, Groups] = {"measured": [tuple(group) for group in values["groups"]]}
    for number in range(arguments.random):
        cases[f"random {number}"] = random_groups(list(subject.specs), cases["measured"], seed=number)
    paths = {}
    for case, groups in cases.items():
        print(f"{case}: {'; '.join(', '.join(group) for group in groups)}", flush=True)
        paths[case] = folder / f"{case.replace(' ', '_')}.yaml"
        save_config(replace(loaded, config=regroup(loaded.config, groups, subject.tasks)), paths[case])
    jobs = [(case, seed) for seed in arguments.seeds for case in cases]
    with ThreadPoolExecutor(max_workers=2) as pool:
        done = list(pool.map(lambda job: train(paths[job[0]], folder / f"{paths[job[0]].stem}-{job[1]}", job[1]), jobs))
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for (case, _), summary in zip(jobs, done, strict=True):
        found[case].append(summary)
    return found


def main() -> None:
    """Measure, train, write results/heterogeneity.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--random", type=int, default=5, help="random groupings")
    parser.add_argument("--groups", type=int, default=5, help="groups of modalities")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of each run")
    parser.add_argument("--samples", type=int, default=128, help="samples of a task that heterogeneity is measured on")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        found = compare(Path(temporary), arguments)
    rows = rows_of(found)
    path = record.write("heterogeneity", rows, seeds=arguments.seeds, seconds=time.perf_counter() - start)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
