"""Does `moemm analyze conflict` find where to split experts? One shared network a layer, on the ten core tasks.

    MOEMM_SUITE=FOLDER python -m benchmarks.conflict_split            # about 10 minutes a seed on 2 cores

Three trunks, from the quickstart's to one that is too narrow for ten tasks, 600 steps, six checkpoints. Where the
analysis writes a split, it is trained with the same seed. `by modality` gives each modality an expert of that width in
every layer, whatever the analysis says: a token passes through as many parameters as before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record, runs
from benchmarks.record import Row
from benchmarks.runs import ROOT, mean_score, row

STEPS, KEEP = 600, 6
TRUNKS: dict[str, dict[str, Any]] = {
    "dim 64, width 256": {"dim": 64, "heads": 4, "width": 256},
    "dim 64, width 32": {"dim": 64, "heads": 4, "width": 32},
    "dim 16, width 16": {"dim": 16, "heads": 2, "width": 16},
}
SHARED, PROPOSED, EVERYWHERE = "one shared network", "the proposed split", "by modality"


class Found(NamedTuple):
    """Of a trunk and seed: cosines that were tested, those under 0, those that last; way -> test score."""

    tested: int
    opposed: int
    lasting: int
    scores: dict[str, float]


def train(name: str, kind: str, folder: Path, trunk: dict[str, Any], seed: int) -> Path:
    """A run with one expert a layer, shared or for each modality; its folder."""
    output = folder / f"{name}_{seed}".replace(" ", "_").replace(",", "")
    model = {key: value for key, value in trunk.items() if key != "width"}
    values = {
        "base": [str(ROOT / "configs" / "recipes" / "dense.yaml"), str(runs.CORE)],
        "data": {"root": str(runs.suite()), "num_workers": 0},
        "model": {**model, "experts": {"groups": [{"kind": kind, "width": trunk["width"]}]}},
        "train": {
            "output": str(output), "seed": seed, "epochs": None, "steps": STEPS, "batch_size": 64, "eval_every": 0,
            "checkpoint": {"every": STEPS // KEEP, "keep": KEEP}, "baselines": False, "log_every": 50,
        },
    }  # fmt: skip
    runs.train(output, str(runs.write_config(output.with_suffix(".yaml"), values)))
    return output


def score(run: Path) -> float:
    """Mean of the tasks on test."""
    return mean_score(json.loads((run / "summary.json").read_text(encoding="utf-8")))


def one(folder: Path, name: str, seed: int) -> Found:
    """Train, analyze, and train what is proposed."""
    run = train(name, "shared", folder, TRUNKS[name], seed)
    if not (run / "conflict" / "conflict.json").exists():
        runs.moemm("analyze", "conflict", str(run))
    values = json.loads((run / "conflict" / "conflict.json").read_text(encoding="utf-8"))
    tested = [entry for entry in values["parts"] if entry["kind"] not in ("experts", "layer")]
    scores = {SHARED: score(run)}
    split = run / "conflict" / "split.yaml"
    if split.exists():
        output = run.with_name(f"{run.name}_split")
        runs.train(output, str(split), "--train.output", str(output))
        scores[PROPOSED] = score(output)
    scores[EVERYWHERE] = score(train(f"{name} by modality", "modality", folder, TRUNKS[name], seed))
    opposed = sum(entry["cos"][-1] is not None and entry["cos"][-1] < 0.0 for entry in tested)
    return Found(len(tested), opposed, len(values["lasting"]), scores)


def rows_of(found: dict[str, list[Found]]) -> list[Row]:
    """A case a trunk and way: sums and means over seeds."""
    rows = []
    for name, results in found.items():
        tested = sum(one.tested for one in results)
        rows.append(Row(case=name, metric="cosines tested at the last step", value=tested))
        rows.append(Row(case=name, metric="of them under 0", value=sum(one.opposed for one in results) / tested))
        rows.append(Row(case=name, metric="conflicts that last", value=sum(one.lasting for one in results)))
        split = [one for one in results if PROPOSED in one.scores]
        rows.append(Row(case=name, metric="runs with a proposal", value=len(split) / len(results)))
        for way in (SHARED, EVERYWHERE):
            rows.append(row(f"{name}: {way}", "score", [one.scores[way] for one in results]))
        gains = [one.scores[EVERYWHERE] - one.scores[SHARED] for one in results]
        rows.append(row(f"{name}: {EVERYWHERE}", "score less shared", gains))
        if split:
            gains = [one.scores[PROPOSED] - one.scores[SHARED] for one in split]
            rows.append(row(f"{name}: {PROPOSED}", "score", [one.scores[PROPOSED] for one in split]))
            rows.append(row(f"{name}: {PROPOSED}", "score less shared", gains, target=0.0))
    proposals = statistics.mean(float(PROPOSED in one.scores) for results in found.values() for one in results)
    return [*rows, Row(case="all trunks", metric="runs with a proposal", value=proposals)]


def main() -> None:
    """Train, analyze, write results/conflict_split.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=None, help="keeps runs, and goes on with those that are there")
    options = parser.parse_args()
    began = time.perf_counter()
    jobs = [(name, seed) for name in TRUNKS for seed in options.seeds]
    with runs.two_at_a_time(options.folder) as (folder, pool):
        done = list(pool.map(lambda job: one(folder, *job), jobs))
    found: dict[str, list[Found]] = {name: [] for name in TRUNKS}
    for (name, _), result in zip(jobs, done, strict=True):
        found[name].append(result)
    path = record.write("conflict_split", rows_of(found), seeds=options.seeds, seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
