"""Extension: a trained model gets a task with modalities that it has not seen, and only what is new is trained.

The base is moemm's recipe on the ten core tasks without one (for news, on all ten), 600 steps; `joint` is the same
model trained on all of them from fresh weights. From the base each way extends with 150 steps of the new task alone:
copies of the expert with the lowest zero-shot loss (the default), drawn experts, copies of the expert with the highest,
and MoExtend's recipe, whose new routed expert is a copy of the most used one and open to the old modalities. Seed 0
also tries copies of experts in between, for the rank correlation of zero-shot loss and score.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from scipy.stats import spearmanr

from benchmarks import runs
from benchmarks.record import Row
from benchmarks.runs import ROOT, row

STEPS, NEW_STEPS = 600, 150
TASKS = ("vowels", "watch", "actions", "news")
NEAREST, RANDOM, WORST, MOEXTEND = "nearest", "random", "worst source", "MoExtend"
BETWEEN = (0.2, 0.4, 0.6, 0.8)
"""Places in the order of sources, from the nearest to the worst."""
SHARE, TRAINED, TIME, FORGOTTEN, MOVED = (
    "score / joint score", "trained / all parameters", "training time / joint", "points that old tasks lose",
    "outputs of old tasks that changed a bit",
)  # fmt: skip
OVER_RANDOM, OVER_WORST, RANKS = "score less random", "score less worst source", "rank correlation, bits and score"


class Extended(NamedTuple):
    """A run that was extended. score: of the new task on test; forgotten: mean over old tasks, in points; bits: of each
    source, where they were measured."""

    score: float
    seconds: float
    trained: float
    forgotten: float
    moved: int
    bits: dict[str, float]


def core_tasks() -> dict[str, dict[str, Any]]:
    """Name -> section of each task, news too."""
    found = yaml.safe_load(runs.CORE.read_text(encoding="utf-8"))["data"]["tasks"]
    return {task["name"]: task for task in [*found, {"name": "news", "file": "news.h5", "rename": {"text": "news"}}]}


def train(names: list[str], output: Path, *, seed: int) -> Path:
    """moemm's recipe on some of the tasks; the run's folder."""
    tasks, core = core_tasks(), yaml.safe_load(runs.CORE.read_text(encoding="utf-8"))
    quick = yaml.safe_load((ROOT / "configs" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    known = {name for task in names for name in modalities(tasks[task])}
    options = {name: one for name, one in {**quick["modalities"], **core["modalities"]}.items() if name in known}
    values = {
        "name": output.name,
        "data": {"root": str(runs.suite()), "num_workers": 0, "temperature": 2.0, "tasks": [tasks[n] for n in names]},
        "modalities": options,
        "model": quick["model"],
        "train": {
            **quick["train"], "output": str(output), "seed": seed, "epochs": None, "steps": STEPS, "batch_size": 64,
            "eval_every": 0, "checkpoint": {"every": 0}, "baselines": False, "log_every": 50,
        },
    }  # fmt: skip
    runs.train(output, str(runs.write_config(output.with_suffix(".yaml"), values)))
    return output


def modalities(task: dict[str, Any]) -> list[str]:
    """Names in the run of what a task's file has."""
    from moemm.data.file import DataFile

    with DataFile(runs.suite() / task["file"]) as file:
        return [task.get("rename", {}).get(info.name, info.name) for info in file.modalities]


OPTIONS = {
    "vowels": [],
    "watch": [],
    "actions": ["--modality", "motion", "--options", '{"patch": [2, 8, 8]}'],
    "news": ["--modality", "news", "--options", '{"vocab_size": 2048}'],
}
"""What `moemm extend` is told of a task's file: names that the joint model has, and its patches. The 2,048 most
frequent of the 4,568 words and letters of news were chosen on val, with a seed of their own, as the learning rate was.
"""


def extend(base: Path, task: str, way: str, arguments: list[str], *, seed: int) -> Extended:
    """`moemm extend` with 150 steps; what its receipt and its summary say."""
    output = base.with_name(f"{task}_{way}_{seed}".replace(" ", "_"))
    if not (output / "summary.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        file = runs.suite() / core_tasks()[task]["file"]
        training = runs.overrides("train", {"steps": NEW_STEPS, "epochs": None, "seed": seed})
        runs.moemm("extend", str(base), "--data", str(file), "--task", task, "--output", str(output),
                   *OPTIONS[task], *arguments, *training)  # fmt: skip
    receipt = json.loads((output / "receipt.json").read_text(encoding="utf-8"))
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    proofs = {one["what"]: one["value"] for one in receipt["proofs"]}
    lost = [100.0 * value for what, value in proofs.items() if what.endswith(" forgotten")]
    return Extended(
        score=summary["tasks"][task]["test"],
        seconds=summary["seconds"],
        trained=(receipt["after"]["total"] - receipt["before"]["total"]) / receipt["after"]["total"],
        forgotten=statistics.mean(lost) if lost else 0.0,
        moved=int(sum(value for what, value in proofs.items() if what.startswith("outputs of "))),
        bits=receipt["details"]["measured"].get("zero_shot_bits", {}),
    )


class Result(NamedTuple):
    """Of a task and seed: score and time of the joint model, ways -> what they came to, source -> (bits, score)."""

    score: float
    seconds: float
    ways: dict[str, Extended]
    sources: dict[str, tuple[float, float]]


def one(folder: Path, task: str, seed: int) -> Result:
    """All runs of a task and seed."""
    eleven = list(core_tasks())
    ten = [name for name in eleven if name != "news"]
    joint = core = train(ten, folder / f"core_{seed}", seed=seed)
    if task == "news":
        joint, base = train(eleven, folder / f"core_and_news_{seed}", seed=seed), core
    else:
        base = train([name for name in ten if name != task], folder / f"without_{task}_{seed}", seed=seed)
    summary = json.loads((joint / "summary.json").read_text(encoding="utf-8"))
    old = json.loads((base / "modalities.json").read_text(encoding="utf-8"))
    ways = {NEAREST: extend(base, task, NEAREST, [], seed=seed)}
    order = sorted(ways[NEAREST].bits, key=lambda name: ways[NEAREST].bits[name])
    ways[RANDOM] = extend(base, task, RANDOM, ["--init", "random"], seed=seed)
    ways[WORST] = extend(base, task, WORST, ["--init", order[-1]], seed=seed)
    known = ["--kind", "routed", "--init", "most_used", "--visible-to", ",".join([*old, *_new(task)])]
    ways[MOEXTEND] = extend(base, task, MOEXTEND, known, seed=seed)
    tried = {order[0]: ways[NEAREST].score, order[-1]: ways[WORST].score}
    for place in BETWEEN if seed == 0 else ():
        name = order[round(place * (len(order) - 1))]
        tried[name] = extend(base, task, name, ["--init", name], seed=seed).score
    sources = {name: (ways[NEAREST].bits[name], score) for name, score in tried.items()}
    return Result(summary["tasks"][task]["test"], summary["seconds"], ways, sources)


def _new(task: str) -> list[str]:
    return modalities(core_tasks()[task])


def rows_of(found: dict[str, list[Result]]) -> list[Row]:
    """A case a task and way; values are means over seeds."""
    rows = []
    for task, results in found.items():
        rows.append(row(f"{task}: joint", "score", [one.score for one in results]))
        for way in results[0].ways:
            rows += _way_rows(task, way, results)
        for other, metric in ((RANDOM, OVER_RANDOM), (WORST, OVER_WORST)):
            gains = [one.ways[NEAREST].score - one.ways[other].score for one in results]
            rows.append(row(f"{task}: {NEAREST}", metric, gains, target=0.0))
        bits, scores = zip(*results[0].sources.values(), strict=True)
        rank = float(spearmanr([-one for one in bits], scores).statistic)
        rows.append(Row(case=f"{task}: {NEAREST}", metric=RANKS, value=rank))
    return rows


def _way_rows(task: str, way: str, results: list[Result]) -> list[Row]:
    case, goal = f"{task}: {way}", way == NEAREST
    ways = [one.ways[way] for one in results]
    less = {
        TRAINED: ([one.trained for one in ways], 0.15),
        TIME: ([own.seconds / one.seconds for own, one in zip(ways, results, strict=True)], 0.25),
        FORGOTTEN: ([one.forgotten for one in ways], 0.0),
        MOVED: ([float(one.moved) for one in ways], 0.0),
    }
    shares = [own.score / one.score for own, one in zip(ways, results, strict=True)]
    rows = [row(case, "score", [one.score for one in ways]), row(case, SHARE, shares, target=0.97 if goal else None)]
    for metric, (values, target) in less.items():
        value, spread = statistics.mean(values), runs.deviation(values)
        target = target if goal else None
        rows.append(Row(case=case, metric=metric, value=value, deviation=spread, better="lower", target=target))
    return rows
