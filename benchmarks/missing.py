"""Missing modalities at test: the same model trained without a care, with modality dropout, and with stand-ins too.

    MOEMM_SUITE=/path/to/suite python -m benchmarks.missing

Each run is scored on every subset of its task's modalities. digits_hard comes with moemm; stamps is read from the
folder MOEMM_SUITE and left out where that is not set. Runs go two at a time, a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import record, runs
from benchmarks.record import Row
from benchmarks.runs import ROOT, deviation, moemm, row

PLAIN, FULL = "as it is", "dropout + predict"
DROPOUT = {"modality_dropout": 0.3}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    PLAIN: ({}, {}),
    "dropout": (DROPOUT, {}),
    "dropout + bank": (DROPOUT, {"kind": "bank"}),
    FULL: (DROPOUT, {"kind": "predict"}),
}
"""What is added to `data` and to `model.missing`."""
SUBWORDS = {"vocabulary": "subword", "vocab_size": 600, "dropout": 0.2}
MODALITIES: dict[str, dict[str, Any]] = {
    "digits_hard": {"image": {"patch": [7, 7]}, "audio": {"noise": 0.4}, "pen": {"noise": 0.1}},
    # Of the words in the test split's captions a third, in the local language half, are in no training caption.
    "stamps": {"image": {"patch": [8, 8]}, "speech": {"patch": [4], "noise": 0.4}, "text": SUBWORDS,
               "text_local": SUBWORDS},
}  # fmt: skip
# Of 15 and 25 the better ones for stamps on val of seeds 10 to 12, with and without dropout.
EPOCHS = {"digits_hard": 12.0, "stamps": 25.0}
Job = tuple[str, str, int]
Result = dict[str, Any]


def recipe(task: str, file: Path, variant: str, *, seed: int, epochs: float, output: Path) -> dict[str, Any]:
    """The configuration of one run: the quickstart's model on one task."""
    data, missing = VARIANTS[variant]
    return {
        "name": "missing",
        "data": {"root": str(file.parent), "tasks": [{"name": task, "file": file.name}], **data},
        "modalities": MODALITIES[task],
        "model": {"dim": 64, "layers": 2, "heads": 4, "dropout": 0.2, "missing": missing},
        "train": {
            "output": str(output),
            "epochs": epochs,
            "batch_size": 64,
            "lr": 2.0e-3,
            "weight_decay": 0.2,
            "label_smoothing": 0.1,
            "seed": seed,
            "baselines": False,
            "log_every": 50,
        },
    }


def run(job: Job, file: Path, folder: Path, *, epochs: float) -> Result:
    """Train one run and score it: what `moemm evaluate --missing all --json` says of its task."""
    task, variant, seed = job
    output = folder / f"{task}_{variant.replace(' ', '')}_{seed}"
    found = output / "missing.json"
    if not found.exists():
        values = recipe(task, file, variant, seed=seed, epochs=epochs, output=output)
        path = runs.write_config(output.with_suffix(".yaml"), values)
        moemm("train", str(path), "--resume")
        found.write_text(moemm("evaluate", str(output), "--missing", "all", "--json"), encoding="utf-8")
    result: Result = json.loads(found.read_text(encoding="utf-8"))["tasks"][task]
    print(f"{task}, {variant}, seed {seed}: mean {result['mean']:.3f}, all {result['complete']:.3f}", flush=True)
    return result


def rows_of(task: str, found: dict[str, list[Result]]) -> list[Row]:
    """Mean over subsets, score of the complete set and each subset; the gain against its target."""
    metric = f"test {found[PLAIN][0]['metric']}"
    means = {variant: [one["mean"] for one in some] for variant, some in found.items()}
    full = {variant: [one["complete"] for one in some] for variant, some in found.items()}
    gains = [with_it - without for with_it, without in zip(means[FULL], means[PLAIN], strict=True)]
    spread = max((deviation(means[variant]) or 0.0 for variant in (FULL, PLAIN)), default=0.0)
    wanted = 2 * spread if len(gains) > 1 else None
    rows = [row(f"{task}, gain of {FULL}", "mean over subsets", gains, target=wanted)]
    for variant in found:
        target = statistics.mean(full[PLAIN]) if variant == FULL else None
        rows.append(row(f"{task}, {variant}", f"{metric}, all modalities", full[variant], target=target))
    rows += [row(f"{task}, {variant}", f"{metric}, mean over subsets", means[variant]) for variant in found]
    for number, subset in enumerate(found[PLAIN][0]["subsets"]):
        for variant in (PLAIN, FULL):
            values = [one["subsets"][number]["value"] for one in found[variant]]
            rows.append(row(f"{task}, {variant}", f"{metric}, {' + '.join(subset['present'])}", values))
    return rows


def files() -> dict[str, Path]:
    """task -> its file, of those that are there; says which are not."""
    found = {"digits_hard": ROOT / "data" / "quickstart" / "digits_hard.h5"}
    suite = os.environ.get("MOEMM_SUITE")
    stamps = Path(suite or "") / "stamps.h5"
    if suite and stamps.exists():
        found["stamps"] = stamps.resolve()
    else:
        print("stamps: left out; set MOEMM_SUITE to a folder that holds stamps.h5")
    return found


def main() -> None:
    """Run, write results/missing.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=1.0, help="of the epochs: below 1 nothing is recorded")
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    arguments = parser.parse_args()
    began, data = time.perf_counter(), files()
    jobs = [(task, variant, seed) for task in data for seed in arguments.seeds for variant in VARIANTS]
    with runs.two_at_a_time(arguments.folder) as (folder, pool):
        epochs = {task: arguments.share * number for task, number in EPOCHS.items()}
        results = list(pool.map(lambda job: run(job, data[job[0]], folder, epochs=epochs[job[0]]), jobs))
    rows = []
    for task in data:
        pairs = [(variant, one) for (name, variant, _), one in zip(jobs, results, strict=True) if name == task]
        rows += rows_of(task, {name: [one for variant, one in pairs if variant == name] for name in VARIANTS})
    if arguments.share < 1:
        print(*(f"{one.case} | {one.metric} | {one.value:.3f}" for one in rows), sep="\n")
        return
    path = record.write("missing", rows, seeds=arguments.seeds, seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
