"""Modality experts shared by measured heterogeneity, against random groups of the same sizes, on the ten core tasks
(configs/base/core.yaml).

    MOEMM_SUITE=FOLDER python -m benchmarks.heterogeneity            # about 20 minutes on 2 cores

Every run has the same model but for who shares: as many experts, as many parameters. Two runs at a time, a core each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import record, runs
from benchmarks.record import Row
from benchmarks.runs import Summary, mean_score, row
from moemm.analyze import Subject, Wanted, analyze_heterogeneity, regroup
from moemm.config import LoadedConfig, load_config, save_config
from moemm.train.setup import learn_modalities

Groups = list[tuple[str, ...]]
SCORE = "test score"


def recipe(folder: Path, *, steps: int) -> LoadedConfig:
    """The ten tasks with half the width shared and half by modality; no routed experts, so that groups are all."""
    values = {
        "base": [str(runs.CORE)],
        "name": "heterogeneity",
        "data": {"root": str(runs.suite()), "num_workers": 0},
        "model": {"experts": {"groups": [{"kind": "shared", "width": 64}, {"kind": "modality", "width": 64}]}},
        "train": {"steps": steps, "batch_size": 32, "lr": 2e-3, "weight_decay": 0.1, "baselines": False},
    }
    return load_config(runs.write_config(folder / "recipe.yaml", values))


def random_groups(names: Sequence[str], like: Groups, *, seed: int) -> Groups:
    """Groups of the same sizes as `like`, filled at random."""
    order = [names[number] for number in np.random.default_rng(seed).permutation(len(names))]
    ends = np.cumsum([len(group) for group in like]).tolist()
    return [tuple(order[end - len(group) : end]) for group, end in zip(like, ends, strict=True)]


def train(path: Path, seed: int) -> Summary:
    """The summary of one run."""
    output = path.with_name(f"{path.stem}-{seed}")
    return runs.train(output, str(path), "--train.seed", str(seed), "--train.output", str(output))


def rows_of(found: dict[str, list[Summary]]) -> list[Row]:
    """Mean over seeds of each grouping, measured against random; then the tasks one by one."""
    means = {case: [mean_score(run) for run in some] for case, some in found.items()}
    chance = [statistics.mean(values) for case, values in means.items() if case != "measured"]
    measured = statistics.mean(means["measured"])
    rows = [row("mean of tasks, measured groups", SCORE, means["measured"], target=statistics.mean(chance))]
    rows += [row(f"mean of tasks, {case}", SCORE, values) for case, values in means.items() if case != "measured"]
    rows.append(row("mean of tasks, random groups", SCORE, chance))
    beaten = sum(measured > value for value in chance) / len(chance)
    rows.append(Row(case="random groups that measured groups beat", metric="share", value=beaten, target=0.5))
    for task in found["measured"][0]["tasks"]:
        for kind in ("measured", "random"):
            values = [run["tasks"][task]["test"] for case in found if case.startswith(kind) for run in found[case]]
            rows.append(row(f"{task}, {kind} groups", SCORE, values))
    sizes = sorted({float(run["params_total"]) for some in found.values() for run in some})
    assert len(sizes) == 1, "groupings of other sizes"
    rows.append(Row(case="every grouping", metric="parameters", value=sizes[0], better="lower"))
    return rows


def compare(folder: Path, pool: ThreadPoolExecutor, arguments: argparse.Namespace) -> dict[str, list[Summary]]:
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
    done = list(pool.map(lambda job: train(paths[job[0]], job[1]), jobs))
    found: dict[str, list[Summary]] = {case: [] for case in cases}
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
    with runs.two_at_a_time(None) as (folder, pool):
        found = compare(folder, pool, arguments)
    rows = rows_of(found)
    path = record.write("heterogeneity", rows, seeds=arguments.seeds, seconds=time.perf_counter() - start)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
