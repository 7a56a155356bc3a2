"""Upcycling: does a dense run that becomes sparse at half of its steps get further than one that goes on as it is?

The dense recipe on the ten core tasks, 300 steps at a constant learning rate; from there 300 more, dense, or upcycled
by each method, which keeps the optimizer's states, the schedule and the place in the data. `, fresh optimizer` begins
as with the weights of another run: with a fresh optimizer, a warm-up, and the order of another seed. So does `branch`:
three copies of the dense model learn a third of the tasks each, for a hundred steps, then 200 steps all together.
Sparse models that begin with fresh weights show what the first 300 steps were worth. `expand` doubles the routed
experts of such a model at half of its steps. A loss is the mean of the last 50 steps, per sample, without the router's
own.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks import runs
from benchmarks.record import Row
from benchmarks.runs import ROOT, mean_score, row

HALF, WINDOW, LOG = 300, 5, 10
BRANCH_STEPS = 100
DENSE, CONTINUED, ANEW = "dense", "dense, continued", "dense, fresh optimizer"
MOEMM = "moemm's recipe"
KEEP = ["--optimizer", "keep"]
MOEMM_RECIPE = ["--recipe", str(ROOT / "configs" / "recipes" / "moemm.yaml")]
METHODS: dict[str, list[str]] = {
    "copy": ["--method", "copy", *KEEP],
    "noise": ["--method", "noise", *KEEP],
    "drop": ["--method", "drop", *KEEP],
    "modality": ["--method", "modality", *KEEP],
    "virtual": ["--method", "virtual", "--granularity", "2", *KEEP],
    MOEMM: [*MOEMM_RECIPE, *KEEP],
    "copy, fresh optimizer": ["--method", "copy"],
    f"{MOEMM}, fresh optimizer": MOEMM_RECIPE,
}
EXPANSIONS = {
    "expand, even": ["--duplicates", "even", *KEEP],
    "expand, gradient": ["--duplicates", "gradient", *KEEP],
}
KEPT = {name for name, arguments in {**METHODS, **EXPANSIONS}.items() if "keep" in arguments}
"""Ways whose curve goes on with the steps of the model that was grown."""
COPIES = [{"kind": "routed", "count": 4, "width": 256}]
SCRATCH: dict[str, dict[str, Any]] = {
    "4 experts from scratch": {"experts": {"groups": COPIES}, "router": {"gates": "straight_through"}},
    "moemm from scratch": {},
}
"""What `copy` and moemm's recipe make of the dense model, with fresh weights instead."""
THIRDS = (
    ("digits_hard", "avclip", "actions"),
    ("stamps", "match", "vowels", "reviews"),
    ("watch", "eeg", "pbc"),
)
FURTHER, LOSS, SCORE = "further steps to the dense run's last loss", "loss after as many steps", "test score"
SUNK, GAIN = "steps to it, all counted", "score less dense, continued"


class Curve(NamedTuple):
    """A run: step and loss of each window of LOG steps, and its score on test."""

    steps: list[int]
    losses: list[float]
    score: float

    def last(self) -> float:
        """The loss at the end."""
        return statistics.mean(self.losses[-WINDOW:])

    def reaches(self, loss: float, *, after: int = 0) -> int | None:
        """The first step behind `after`, counted from there, at which the loss is as low; None where it never is."""
        for end in range(WINDOW, len(self.steps) + 1):
            if self.steps[end - WINDOW] > after and statistics.mean(self.losses[end - WINDOW : end]) <= loss:
                return self.steps[end - 1] - after
        return None


def curve(folder: Path) -> Curve:
    """Of a run that is finished; of a run that was resumed, all of it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = {line["step"]: line["loss"] - line["router_loss"] for line in lines if line["event"] == "train"}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return Curve(list(told), list(told.values()), mean_score(summary))


def train_section(output: Path, *, steps: int, seed: int) -> dict[str, Any]:
    """Constant learning rate: a run can be cut and gone on with at any step."""
    return {
        "output": str(output), "seed": seed, "epochs": None, "steps": steps, "batch_size": 64, "min_lr": 1.0,
        "eval_every": 0, "checkpoint": {"every": 0}, "baselines": False, "log_every": LOG,
    }  # fmt: skip


def begin(name: str, recipe: str, folder: Path, *, seed: int, steps: int | None = None, **sections: Any) -> Path:
    """Train a recipe on the core tasks; the run's folder."""
    output = folder / f"{name}_{seed}".replace(" ", "_").replace(",", "").replace("'", "")
    values: dict[str, Any] = {
        "base": [str(ROOT / "configs" / "recipes" / f"{recipe}.yaml"), str(runs.CORE)],
        "data": {"root": str(runs.suite()), "num_workers": 0},
        "train": train_section(output, steps=steps or HALF, seed=seed),
    }
    for key, section in sections.items():
        values[key] = {**values.get(key, {}), **section}
    runs.train(output, str(runs.write_config(output.with_suffix(".yaml"), values)))
    return output


def go_on(base: Path, name: str, *, seed: int) -> Path:
    """A copy of the run, trained for as many steps again, as if it had not stopped."""
    output = base.with_name(f"{name}_{seed}".replace(" ", "_").replace(",", ""))
    if not (output / "summary.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(base, output)
        (output / "summary.json").unlink()
        runs.moemm("train", str(output / "config.yaml"), "--resume", "--train.output", str(output),
                   "--train.steps", str(2 * HALF))  # fmt: skip
    return output


def grow(sources: list[Path], name: str, arguments: list[str], *, seed: int, steps: int | None = None) -> Path:
    """Upcycle and train on, in the order of the source, or another one where its training does not go on."""
    output = sources[0].with_name(f"{name}_{seed}".replace(" ", "_").replace(",", "").replace("'", ""))
    if not (output / "summary.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        runs.moemm("upcycle", *map(str, sources), *arguments, "--output", str(output))
        kept = name in KEPT
        values = train_section(output, steps=2 * HALF if kept else steps or HALF, seed=seed if kept else seed + 100)
        runs.moemm("train", str(output / "config.yaml"), "--resume", *runs.overrides("train", values))
    return output


def branches(base: Path, folder: Path, *, seed: int) -> list[Path]:
    """Copies of the dense model, each trained on a third of the tasks."""
    core = yaml.safe_load(runs.CORE.read_text(encoding="utf-8"))["data"]["tasks"]
    found = []
    for number, names in enumerate(THIRDS):
        tasks = [{**task, "learn": task["name"] in names} for task in core]
        own = {"data": {"tasks": tasks}, "train": {"init": str(base)}}
        found.append(begin(f"branch{number}", "dense", folder, seed=seed, steps=BRANCH_STEPS, **own))
    return found


def one_seed(folder: Path, seed: int) -> dict[str, Curve]:
    """All runs of a seed."""
    base = begin(DENSE, "dense", folder, seed=seed)
    again = {"init": str(base), "seed": seed + 100}
    found = {
        CONTINUED: curve(go_on(base, CONTINUED, seed=seed)),
        ANEW: curve(begin(ANEW, "dense", folder, seed=seed, train=again)),
    }
    for name, arguments in METHODS.items():
        found[name] = curve(grow([base], name, arguments, seed=seed))
    thirds = branches(base, folder, seed=seed)
    found["branch"] = curve(grow(thirds, "branch", ["--method", "branch"], seed=seed, steps=2 * BRANCH_STEPS))
    for name, model in SCRATCH.items():
        half = begin(name, "moemm", folder, seed=seed, model=model)
        found[name] = curve(go_on(half, f"{name} on", seed=seed))
    for name, arguments in EXPANSIONS.items():
        found[name] = curve(grow([half], name, ["--method", "expand", *arguments], seed=seed))
    return found


def rows_of(found: list[dict[str, Curve]]) -> list[Row]:
    """Means over seeds of each way: steps to the dense run's last loss, loss and score; gains over going on densely."""
    goals = [one[CONTINUED].last() for one in found]
    rows = []
    for name in found[0]:
        curves = [one[name] for one in found]
        behind, spent = _spent(name)
        reached = [one.reaches(goal, after=behind) for one, goal in zip(curves, goals, strict=True)]
        sunk = [None if steps is None else steps + spent for steps in reached]
        if spent:
            target = HALF - 1.0 if name in METHODS and name in KEPT else None
            rows.append(_steps(name, FURTHER, [steps and steps + spent - HALF for steps in reached], target=target))
        rows.append(_steps(name, SUNK, sunk))
        rows.append(_row(name, LOSS, [one.last() for one in curves]))
        rows.append(row(name, SCORE, [one.score for one in curves]))
        if name != CONTINUED:
            gains = [one.score - other[CONTINUED].score for one, other in zip(curves, found, strict=True)]
            rows.append(row(name, GAIN, gains))
    return rows


def _spent(name: str) -> tuple[int, int]:
    """Steps of a run's own curve that do not count as further ones, and steps that were made before its curve begins.

    A run that went on has its steps from the beginning in its curve; one with a fresh optimizer begins at 0; branches
    were trained side by side.
    """
    if name == CONTINUED or name in KEPT:
        return HALF, HALF
    if name == "branch":
        return 0, HALF + len(THIRDS) * BRANCH_STEPS
    return (0, 0) if name in SCRATCH else (0, HALF)


def _row(case: str, metric: str, values: list[float], *, target: float | None = None) -> Row:
    """Mean and deviation of values of which less is better."""
    value = statistics.mean(values)
    return Row(case=case, metric=metric, value=value, deviation=runs.deviation(values), better="lower", target=target)


def _steps(case: str, metric: str, values: list[int | None], *, target: float | None = None) -> Row:
    """Mean of steps; no value where a seed never got there."""
    known = [float(value) for value in values if value is not None]
    if len(known) == len(values):
        return _row(case, metric, known, target=target)
    note = f"{len(known)} of {len(values)} seeds got there"
    return Row(case=case, metric=metric, value=None, better="lower", target=target, note=note)
