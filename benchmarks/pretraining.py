"""What pretraining without labels gains where few labels are known: the ten core tasks of the suite, 5 % of the labels.

    MOEMM_SUITE=FOLDER python -m benchmarks.pretraining        # about 20 minutes on 2 idle cores

For each seed three runs: masked + contrastive pretraining on the training inputs of all tasks, without a label; then
fine-tuning with 5 % of the labels; and the same fine-tuning, of as many steps, from scratch. The labels are the same in
both. Two runs go at a time, a core each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from benchmarks import record
from benchmarks.record import Row

TASKS: dict[str, dict[str, Any]] = {
    "digits_hard": {"rename": {"audio": "voice", "image": "digit"}},
    "avclip": {"rename": {"video": "clip"}},
    "stamps": {},
    "match": {"rename": {"speech": "utterance"}},
    "watch": {},
    "eeg": {},
    "pbc": {},
    "reviews": {},
    "actions": {},
    "vowels": {},
}
SHARE = 0.05
Summary = dict[str, Any]
MODEL = {
    "dim": 64,
    "layers": 2,
    "heads": 4,
    "dropout": 0.1,
    "experts": {
        "groups": [
            {"kind": "shared", "width": 128},
            {"kind": "modality", "width": 64},
            {"kind": "routed", "count": 4, "width": 64},
        ]
    },
}
MODALITIES = {
    "digit": {"patch": [7, 7]},
    "clip": {"patch": [2, 8, 8]},
    "speech": {"patch": [4]},
    "utterance": {"patch": [4]},
    "text": {"max_tokens": 64, "vocab_size": 4096},
    "text_local": {"max_tokens": 64, "vocab_size": 4096},
}
OBJECTIVES = {
    "supervised": {"weight": 0.0},
    "masked": {"weight": 1.0, "ratio": 0.4, "cross_modal": 0.15},
    "contrastive": {"weight": 0.3},
}
PRETRAIN = {"lr": 2.0e-3, "weight_decay": 0.05, "warmup": 0.05}
# Of 1e-3, 2e-3 and 4e-3 the best on val of seed 0, for fine-tuning and from scratch alike.
FINETUNE = {"lr": 4.0e-3, "weight_decay": 0.1, "warmup": 0.1, "label_smoothing": 0.1}


def config(suite: Path, output: Path, *, seed: int, steps: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """One run as a configuration; sections: `objectives`, and more keys of `data` and `train`."""
    tasks = [{"name": name, "file": f"{name}.h5", **extra} for name, extra in TASKS.items()]
    train = {"output": str(output), "steps": steps, "seed": seed, "batch_size": 64, "log_every": 50, "baselines": False}
    return {
        "name": output.name,
        "data": {"root": str(suite), "tasks": tasks, "temperature": 2.0, "num_workers": 0, **sections.get("data", {})},
        "modalities": MODALITIES,
        "model": MODEL,
        "objectives": sections.get("objectives", {}),
        "train": {**train, **sections.get("train", {})},
    }


def run(values: dict[str, Any]) -> Summary:
    """Train in a process of its own, one thread; a run that is finished is not run again."""
    output = Path(values["train"]["output"])
    output.parent.mkdir(parents=True, exist_ok=True)
    summary = output / "summary.json"
    if not summary.exists():
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        command = [sys.executable, "-W", "ignore", "-m", "moemm", "train", str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr}")
    found: Summary = json.loads(summary.read_text(encoding="utf-8"))
    print(output.name, round(found["seconds"]), "s, mean", round(mean_score(found), 4), flush=True)
    return found


def run_seed(suite: Path, folder: Path, seed: int, steps: tuple[int, int]) -> dict[str, Summary]:
    """The three runs of a seed: pretraining, fine-tuning from it, and from scratch."""
    few, names = {"label_share": SHARE}, [folder / f"{kind}_{seed}" for kind in ("pretrain", "finetune", "scratch")]
    before, after, scratch = names
    pretrain = config(suite, before, seed=seed, steps=steps[0], objectives=OBJECTIVES, train=PRETRAIN)
    options = {"seed": seed, "steps": steps[1], "data": few}
    found = {"pretrain": run(pretrain)}
    found["finetune"] = run(config(suite, after, **options, train={**FINETUNE, "init": str(before)}))
    found["scratch"] = run(config(suite, scratch, **options, train=FINETUNE))
    return found


def mean_score(summary: Summary) -> float:
    """Mean of the test scores over the tasks."""
    return statistics.mean(task["test"] for task in summary["tasks"].values())


def rows_of(found: list[dict[str, Summary]]) -> list[Row]:
    """The means with pretraining against those from scratch, then each task."""
    means = {kind: [mean_score(one[kind]) for one in found] for kind in ("finetune", "scratch")}
    target = statistics.mean(means["scratch"])
    gains = [a - b for a, b in zip(means["finetune"], means["scratch"], strict=True)]
    rows = [
        row("mean of 10 tasks, 5 % of the labels, pretrained", "test score", means["finetune"], target=target),
        row("mean of 10 tasks, 5 % of the labels, from scratch", "test score", means["scratch"]),
        row("mean of 10 tasks, pretrained - from scratch", "gain of a seed", gains, target=0.0),
    ]
    for task in TASKS:
        metric = found[0]["scratch"]["tasks"][task]["metric"]
        for kind, text in (("finetune", "pretrained"), ("scratch", "from scratch")):
            values = [one[kind]["tasks"][task]["test"] for one in found]
            rows.append(row(f"{task}, {text}", f"test {metric}", values))
    return rows


def row(case: str, metric: str, values: list[float], *, target: float | None = None) -> Row:
    """Mean and deviation over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Row(case=case, metric=metric, value=statistics.mean(values), deviation=deviation, target=target)


def main() -> None:
    """Run, write results/pretraining.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--finetune-steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    parser.add_argument("--dry", action="store_true", help="print the table, write no result")
    options = parser.parse_args()
    if "MOEMM_SUITE" not in os.environ:
        raise SystemExit("MOEMM_SUITE is not set: give the folder of the suite's HDF5 files")
    suite, steps = Path(os.environ["MOEMM_SUITE"]).resolve(), (options.pretrain_steps, options.finetune_steps)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max_workers=2) as pool:
        folder = (options.folder or Path(temporary)).resolve()
        found = list(pool.map(lambda seed: run_seed(suite, folder, seed, steps), options.seeds))
    rows = rows_of(found)
    if options.dry:
        for one in rows:
            print(f"{one.case:<55} {one.metric:<16} {one.value:.3f}")
        return
    seconds = sum(summary["seconds"] for one in found for summary in one.values())
    path = record.write("pretraining", rows, seeds=options.seeds, seconds=seconds)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
