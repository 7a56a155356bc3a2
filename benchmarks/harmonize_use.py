"""What each way to harmonize losses is worth in scores, against their plain sum with the same seed.

    MOEMM_SUITE=FOLDER OMP_NUM_THREADS=1 python -W ignore -m benchmarks.harmonize_use       # about 95 minutes
    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.harmonize_use --settings avclip noise  # about 45 minutes

avclip is the recipe's case (configs/recipes/conflict.yaml), digit and motion of each clip, with longer tubes and fewer
epochs, so that a run takes some seconds. noise is the same with a third label of random values, whose loss weighs
ten times as much and teaches nothing; scores are those of the two real tasks. stamps is category and language of a
stamp's picture, English caption and spoken caption: the category is not to depend on who speaks, the language is. A
method is chosen by val on seeds of its own, and held to the targets by test on others. Runs go one at a time, in this
process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from benchmarks import record, runs
from benchmarks.record import Matrix, Row
from benchmarks.runs import ROOT, Summary, deviation, row
from moemm.config import load_config
from moemm.train import train

SUM, UPGRAD, ALONE, ORACLE = "plain sum", "upgrad", "each task alone", "without the noise"
METHODS = ["realign", "curriculum", "pcgrad", "cagrad", "mgda", "imtl_g", "nash_mtl", "aligned_mtl", UPGRAD]
METHODS += ["dual_cone", "equal_norm", "random"]
OF_A_BATCH = (UPGRAD, "mgda", "gradvac")
SCALES = ("uncertainty", "famo", "gradnorm")
CASES: dict[str, dict[str, Any]] = {
    SUM: {"method": "sum"},
    **{method: {"method": method} for method in METHODS},
    **{f"{method} a batch": {"method": method, "per": "batch"} for method in OF_A_BATCH},
    **{scale: {"scale": scale} for scale in SCALES},
    "dwa": {"scale": "dwa", "scale_window": 10},  # a run has 94 steps, of stamps 193
}
"""Case -> `harmonize`."""
CONTROLS = ("random",)
"""Told, never chosen."""
RATES = {"plain sum, quarter the rate": 0.25, "plain sum, half the rate": 0.5, "plain sum, twice the rate": 2.0}
"""Case -> factor of the learning rate."""
NOISE, NOISE_WEIGHT, NOISE_CLASSES = "noise", 10.0, 10
CHOICE = (10, 11)
"""Seeds of which val chooses the method that is held to the targets."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """Two labels of each sample. probes: task -> label. modalities: those that are used, with their options.

    suite: the file comes not with moemm, but with the suite.
    """

    file: str
    probes: dict[str, str]
    modalities: dict[str, dict[str, Any]]
    lr: float
    epochs: float
    suite: bool = False

    def find(self) -> Path:
        """The path of the file. Raises SystemExit where it is not there."""
        path = (runs.suite() if self.suite else ROOT / "data" / "quickstart") / self.file
        if not path.exists():
            raise SystemExit(f"{path} is not there: leave what reads it out of --settings, or put it there")
        return path


AVCLIP = Subject(
    file="avclip.h5",
    probes={"digit": "label", "motion": "label_motion"},
    modalities={"video": {"patch": [3, 8, 8]}, "audio": {"noise": 0.4}},
    lr=9e-3,  # of 0.004, 0.006, 0.009 and 0.013 the best one for the plain sum on val of the seeds for choosing
    epochs=5.0,
)
# Without the caption in the language, which names it. Where speech is normalized over all samples the language is
# found for 98 of 100 of val by the plain sum, which leaves nothing to compare.
STAMPS = Subject(
    file="stamps.h5",
    probes={"category": "label", "language": "label_lang"},
    modalities={
        "image": {"patch": [8, 8]},
        "speech": {"patch": [8], "normalize": "sample", "noise": 0.4},
        "text": {"vocabulary": "subword", "vocab_size": 600, "dropout": 0.2},
    },
    lr=19e-3,  # of 0.004, 0.006, 0.009, 0.013, 0.019 and 0.028, in the same way
    epochs=12.0,
    suite=True,
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """cases: what is trained. gain: what is wanted over the plain sum. noisy: with the random label."""

    subject: Subject
    cases: tuple[str, ...]
    gain: float = 0.0
    noisy: bool = False


CLEAN = "avclip"
SETTINGS = {
    CLEAN: Setting(subject=AVCLIP, cases=(ALONE, *CASES)),
    NOISE: Setting(subject=AVCLIP, cases=(ORACLE, *CASES, *RATES), gain=0.12, noisy=True),
    "stamps": Setting(subject=STAMPS, cases=(ALONE, *CASES)),
}


class Score(NamedTuple):
    """Of one seed. of: task -> test score. val: mean of the tasks."""

    of: dict[str, float]
    val: float

    @property
    def mean(self) -> float:
        """Mean of the tasks' test scores."""
        return statistics.mean(self.of.values())


Scores = dict[str, dict[int, Score]]
"""Case -> seed -> score."""


def plant(source: Path, path: Path) -> Path:
    """Copy a file, with a column `label_noise` of random classes; the path. The values are always the same."""
    if not path.exists():
        path.write_bytes(source.read_bytes())
        with h5py.File(path, "a") as file:
            values = np.random.default_rng(0).integers(NOISE_CLASSES, size=len(file["label"]))
            file.create_dataset("label_noise", data=values.astype(np.int64))
    return path


def recipe(name: str, case: str, *, tasks: Sequence[str], file: Path, seed: int, output: Path) -> dict[str, Any]:
    """The configuration of one run: the recipe's model on these tasks."""
    subject = SETTINGS[name].subject
    shared = {"file": file.name, "modalities": list(subject.modalities)}
    asked: list[dict[str, Any]] = [{"name": task, "label": subject.probes[task], **shared} for task in tasks]
    if SETTINGS[name].noisy:
        asked.append({"name": NOISE, "label": "label_noise", "weight": NOISE_WEIGHT, **shared})
    return {
        "name": "harmonize_use",
        "data": {
            "root": str(file.parent),
            "tasks": asked,
            "joint_labels": len(asked) > 1,
            "modality_dropout": 0.15,
            "num_workers": 0,
        },
        "modalities": subject.modalities,
        "model": {"dim": 64, "layers": 2, "heads": 4, "dropout": 0.2},
        "harmonize": CASES.get(case, CASES[SUM]),
        "train": {
            "output": str(output),
            "epochs": subject.epochs,
            "batch_size": 64,
            "lr": subject.lr * RATES.get(case, 1.0),
            "weight_decay": 0.2,
            "label_smoothing": 0.1,
            "seed": seed,
            "baselines": False,
            "log_every": 10,
        },
    }


def run(name: str, case: str, *, tasks: Sequence[str], seed: int, folder: Path) -> Summary:
    """The summary of one run; one that is finished is not run again."""
    if case == ORACLE:
        name, case = CLEAN, SUM
    output = place(name, case, tasks=tasks, seed=seed, folder=folder)
    path = output / "summary.json"
    if not path.exists():
        file = SETTINGS[name].subject.find()
        file = plant(file, folder / "noisy.h5") if SETTINGS[name].noisy else file
        values = recipe(name, case, tasks=tasks, file=file, seed=seed, output=output)
        loaded = load_config(runs.write_config(folder / f"{output.name}.yaml", values))
        with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
            train(loaded, resume=True)
    summary: Summary = json.loads(path.read_text(encoding="utf-8"))
    return summary


def place(name: str, case: str, *, tasks: Sequence[str], seed: int, folder: Path) -> Path:
    """The folder of a run."""
    return folder / "_".join(f"{name} {case} {' '.join(tasks)} {seed}".replace(",", "").split())


def score(name: str, case: str, *, seed: int, folder: Path) -> Score:
    """The scores of the real tasks with one seed: of one run, or of one a task."""
    tasks = list(SETTINGS[name].subject.probes)
    groups = [[task] for task in tasks] if case == ALONE else [tasks]
    began = time.perf_counter()
    found: dict[str, Any] = {}
    for group in groups:
        found |= run(name, case, tasks=group, seed=seed, folder=folder)["tasks"]
    done = Score({task: found[task]["test"] for task in tasks}, statistics.mean(found[task]["val"] for task in tasks))
    scores = ", ".join(f"{task} {value:.3f}" for task, value in done.of.items())
    print(f"{name}, {case}, seed {seed}: {scores}, {time.perf_counter() - began:.1f} s", flush=True)
    return done


def choose(found: Scores) -> str:
    """The method with the best mean of val over the seeds for choosing; controls and the plain sum are none."""
    asked = [case for case in found if case in CASES and case not in (SUM, *CONTROLS)]
    return max(asked, key=lambda case: chosen_val(found[case]))


def chosen_val(scores: dict[int, Score]) -> float:
    """Mean of val over the seeds for choosing."""
    return statistics.mean(scores[seed].val for seed in CHOICE)


def gains(found: Scores, case: str, task: str | None, seeds: Sequence[int]) -> list[float]:
    """What a case has over the plain sum, a value a seed: of one task, or of the mean of all."""
    pairs = [(found[case][seed], found[SUM][seed]) for seed in seeds]
    return [a.mean - b.mean if task is None else a.of[task] - b.of[task] for a, b in pairs]


def rows_of(name: str, found: Scores, seeds: Sequence[int]) -> list[Row]:
    """The chosen method against its targets; then what columns() names of each case."""
    setting, named = SETTINGS[name], choose(found)
    title = f"{name}, {named} (chosen) less plain sum"
    rows = [row(title, "mean of tasks", gains(found, named, None, seeds), target=setting.gain)]
    for task in setting.subject.probes:
        spread = deviation([found[SUM][seed].of[task] for seed in seeds])
        target = None if spread is None else -spread
        rows.append(row(title, task, gains(found, named, task, seeds), target=target))
    for case, scores in found.items():
        more = gains(found, case, None, seeds)
        rows.append(row(case, f"{name}: mean of tasks", [scores[seed].mean for seed in seeds]))
        for task in setting.subject.probes:
            rows.append(row(case, f"{name}: {task}", [scores[seed].of[task] for seed in seeds]))
        rows.append(Row(case=case, metric=f"{name}: val of the seeds for choosing", value=chosen_val(scores)))
        if case != SUM:
            rows.append(row(case, f"{name}: gain", more))
            rows.append(Row(case=case, metric=f"{name}: deviation of the gain", value=deviation(more), better="lower"))
            rows.append(row(case, f"{name}: seeds with a gain", [float(one > 0.0) for one in more]))
    return rows


def columns(name: str) -> Matrix:
    """The table of a setting."""
    heads = {"mean": "mean of tasks", **{task: task for task in SETTINGS[name].subject.probes}}
    heads |= {"gain": "gain", "± of gain": "deviation of the gain", "seeds with a gain": "seeds with a gain"}
    heads |= {"val, for choosing": "val of the seeds for choosing"}
    title = f"{name}: test accuracy, mean over seeds; gain over the plain sum with the same seed"
    return Matrix(title=title, columns={head: f"{name}: {metric}" for head, metric in heads.items()}, digits=3)


def conflicts(name: str, seeds: Sequence[int], folder: Path) -> Iterator[Row]:
    """How the gradients of two losses stood to each other in the runs of `upgrad`, over all their steps."""
    told: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        output = place(name, UPGRAD, tasks=list(SETTINGS[name].subject.probes), seed=seed, folder=folder)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        events = [found for line in lines if (found := json.loads(line).get("conflict"))]
        for pair in events[0]:
            for number, metric in enumerate(("cosine of a sample", "share of samples under 0")):
                mean = statistics.mean(event[pair][number] for event in events)
                told.setdefault((pair, metric), []).append(mean)
    for (pair, metric), values in told.items():
        yield row(f"{name}, {pair}, {UPGRAD}", metric, values)


def setting_of(row: dict[str, Any]) -> str:
    """Of which setting a row of the results is."""
    heads = (row["case"].split(", ")[0], row["metric"].split(": ")[0])
    return next(name for name in SETTINGS if name in heads)


def main() -> None:
    """Train, write results/harmonize_use.json, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="rows of others stay")
    parser.add_argument("--seeds", type=int, default=6, help="to report, from 0")
    parser.add_argument("--folder", type=Path, help="keep the runs here; those that are finished are not run again")
    arguments = parser.parse_args()
    began, seeds, rows = time.perf_counter(), list(range(arguments.seeds)), []
    for name in arguments.settings:
        SETTINGS[name].subject.find()  # what is not there is to be told now, and not after an hour of runs
    kept = record.keep("harmonize_use", arguments.settings, setting_of)
    with runs.two_at_a_time(arguments.folder) as (folder, _):
        for name in arguments.settings:
            found: Scores = {case: {} for case in SETTINGS[name].cases}
            for seed in [*CHOICE, *seeds]:
                for case, scores in found.items():
                    scores[seed] = score(name, case, seed=seed, folder=folder)
            rows += [*rows_of(name, found, seeds), *conflicts(name, seeds, folder)]
    matrices = [columns(name) for name in arguments.settings]
    seconds = time.perf_counter() - began
    path = record.write("harmonize_use", rows, seeds=seeds, seconds=seconds, matrices=matrices, kept=kept)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
