"""What wrong pairs cost contrastive alignment, and what each way of meeting them gives back.

    MOEMM_SUITE=FOLDER python -m benchmarks.noisy_pairs              # about 50 minutes on 2 cores

Triplets of video, audio and text are made of avclip: each clip comes several times, each time with another recording of
its digit and a caption of its digit and motion (60 of them, worded in 15 ways). In a share of the training triplets the
caption is of another digit or motion, and in some settings the recording too is of another digit. Trained on the pairs
video-audio and video-text, scored on the clean test split: share of the clips whose own caption is among the five
nearest of the 60, and accuracy of a linear probe of the digit on the three encodings. Whoever knows the planted pairs
(`oracle`) shows what there is to gain; dropping or weighing at random, at the same rates in each step, shows what comes
of counting fewer pairs alone. In one setting each clip has one recording and one caption that come
again and again; in another each triplet is seen once, in a third of the steps of the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import record, runs
from benchmarks.record import Row
from moemm.config import load_config
from moemm.data.dataset import SplitDataset
from moemm.data.file import DataFile
from moemm.data.pack import Packer
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.harmonize import Context, register_harmonizer
from moemm.harmonize.methods import curriculum
from moemm.modalities import prepare_functions
from moemm.objectives import LabelFree
from moemm.objectives.noise import PairNoise
from moemm.train import load_run, train

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
MOTIONS = (
    ("goes left", "moves to the left", "slides left"),
    ("goes right", "moves to the right", "slides right"),
    ("goes up", "rises", "climbs up"),
    ("goes down", "falls", "sinks down"),
    ("grows", "gets larger", "comes closer"),
    ("shrinks", "gets smaller", "moves away"),
)
OPENINGS = ("a {}", "the digit {}", "here a {}", "someone says {} as it", "number {}")
PAIRS = [["video", "audio"], ["video", "text"]]
MOST = 6005
"""Samples of a split that are scored at most: five copies of each clip."""
RECALL, PROBE, FOUND = "recall at 5, video to text", "accuracy of a probe", "area under the ROC curve"


class Setting(NamedTuple):
    """share of the training triplets whose `wrong` modalities are another's; copies of each clip; passes over them."""

    share: float
    wrong: tuple[str, ...] = ("text",)
    copies: int = 5
    epochs: float = 12

    @property
    def name(self) -> str:
        """As it stands in the table."""
        few = ", each clip once" if self.copies == 1 else ""
        fresh = ", each triplet seen once" if self.epochs <= 1 else ""
        of = f"{self.share:.0%} wrong {' and '.join(self.wrong)}" if self.share else "clean"
        return f"{of}{few}{fresh}"


WAYS: dict[str, dict[str, Any]] = {
    "plain sum": {},
    "weighed (default)": {"noisy_pairs": "weigh"},
    "weights dealt at random": {"noisy_pairs": "weigh", "patch": "shuffled"},
    "oracle": {"noisy_pairs": "weigh", "patch": "oracle"},
    "curriculum": {"harmonize": {"method": "curriculum"}},
    "dropped at random": {"harmonize": {"method": "random_drop"}},
    "realign": {"harmonize": {"method": "realign"}},
    "plain sum, half the rate": {"lr": 0.5},
    "plain sum, twice the rate": {"lr": 2.0},
}
MAIN = ("plain sum", "weighed (default)", "weights dealt at random", "oracle")
SETTINGS: dict[Setting, tuple[str, ...]] = {
    Setting(0.5): tuple(WAYS),
    Setting(0.0): ("plain sum", "weighed (default)"),
    Setting(0.25): ("plain sum", "weighed (default)"),
    Setting(0.5, ("audio", "text")): MAIN,
    Setting(0.5, copies=1, epochs=60): MAIN,
    Setting(0.5, copies=20, epochs=1): MAIN,
}
TARGETS = {0.5: 6.0, 0.0: -1.5}
"""Points of recall over the plain sum that the default is to bring, by share of wrong pairs."""


def random_drop(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """As many of a batch's samples as `curriculum` would leave out, but others."""
    keep_XT = curriculum(gram_XTT, context)
    return keep_XT[torch.randperm(keep_XT.shape[0], generator=context.generator)]


def caption(digit: int, motion: int, draw: np.random.Generator) -> str:
    """One of 15 wordings."""
    opening = OPENINGS[int(draw.integers(len(OPENINGS)))].format(DIGITS[digit])
    return f"{opening} {MOTIONS[motion][int(draw.integers(3))]}"


def _partners(items: np.ndarray, same: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """For each item one of those that are the same in `same`, each used once."""
    found = items.copy()
    for value in np.unique(same[items]):
        place = np.nonzero(same[items] == value)[0]
        found[place] = items[place[draw.permutation(len(place))]]
    return found


def triplets(folder: Path, setting: Setting, seed: int) -> np.ndarray:
    """Write triplets.h5; (N,) bool which of its samples have a wrong pair."""
    draw = np.random.default_rng(seed)
    with DataFile(runs.suite() / "avclip.h5") as file:
        digit, motion = file.targets(), file.targets("label_motion")
        samples = [file.sample(index) for index in range(len(file))]
        names = file.info.labels["label"].class_names
        split = np.asarray(file.split)
    items = [(index, index, index) for index in np.nonzero(split > 0)[0]]
    items = [one for one in items if split[one[0]] in (1, 2)]
    wrong = np.zeros(len(items), bool)
    train_items = np.nonzero(split == 0)[0]
    for _ in range(setting.copies):
        spoken = _partners(train_items, digit, draw) if setting.copies > 1 else train_items.copy()
        told = train_items.copy()
        bad = draw.permutation(len(train_items))[: round(setting.share * len(train_items))]
        key = digit * 6 + motion
        for place in bad:
            told[place] = draw.choice(train_items[key[train_items] != key[train_items[place]]])
            if "audio" in setting.wrong:
                spoken[place] = draw.choice(train_items[digit[train_items] != digit[train_items[place]]])
        items += list(zip(train_items, spoken, told, strict=True))
        wrong = np.concatenate([wrong, np.isin(np.arange(len(train_items)), bad)])
    seen = [one[0] for one in items]
    write_file(
        folder / "triplets.h5",
        task="triplets",
        labels={
            "label": LabelData(values=digit[seen], class_names=names),
            "label_motion": LabelData(values=motion[seen]),
        },
        split=split[seen],
        modalities={
            "video": ModalityData(kind="video", values=np.stack([samples[a]["video"] for a in seen]), layout="NTCHW"),
            "audio": ModalityData(kind="audio_mfcc", values=[samples[b]["audio"] for _, b, _ in items]),
            "text": ModalityData(kind="text", values=[caption(digit[c], motion[c], draw) for *_, c in items]),
        },
    )
    return wrong


def recipe(folder: Path, setting: Setting, way: dict[str, Any], seed: int) -> Path:
    """The configuration of a run."""
    values = {
        "name": "noisy_pairs",
        "data": {"root": str(folder), "num_workers": 0, "tasks": [{"name": "triplets", "file": "triplets.h5"}]},
        "modalities": {"video": {"patch": [3, 12, 12]}, "audio": {"patch": [4]}},
        "model": {"dim": 64, "layers": 1, "heads": 4, "dropout": 0.1, "moe": "dense"},
        "objectives": {
            "supervised": {"weight": 0.0},
            "contrastive": {"weight": 1.0, "pairs": PAIRS, "noisy_pairs": way.get("noisy_pairs", "ignore")},
        },
        "harmonize": way.get("harmonize", {}),
        "train": {
            "output": str(folder / "run"), "epochs": setting.epochs, "batch_size": 128, "seed": seed,
            "lr": 4e-3 * way.get("lr", 1.0), "weight_decay": 0.05, "eval_every": 0, "baselines": False,
        },
    }  # fmt: skip
    return runs.write_config(folder / "recipe.yaml", values)


@contextmanager
def patched(patch: str | None, wrong: np.ndarray, seed: int, modalities: tuple[str, ...] = ("text",)) -> Iterator[None]:
    """PairNoise with weights that know the planted pairs, or with the estimated ones dealt out at random."""
    estimated, draw = PairNoise.weights, torch.Generator().manual_seed(seed)
    right_R = torch.from_numpy(~wrong).float()

    def oracle(self: PairNoise, row_N: torch.Tensor) -> torch.Tensor:
        both = self.right_RP.new_ones(len(row_N), self.right_RP.shape[1])
        for number, pair in enumerate(PAIRS):
            if set(pair) & set(modalities):
                both[:, number] = right_R[row_N]
        return both

    def shuffled(self: PairNoise, row_N: torch.Tensor) -> torch.Tensor:
        return estimated(self, row_N)[torch.randperm(len(row_N), generator=draw)]

    if patch is not None:
        PairNoise.weights = {"oracle": oracle, "shuffled": shuffled}[patch]  # type: ignore[method-assign]
    try:
        yield
    finally:
        PairNoise.weights = estimated  # type: ignore[method-assign]


def encode(folder: Path, split: str) -> tuple[torch.Tensor, np.ndarray]:
    """(N, M, D) what the run makes of each modality of a split's samples, and (N,) where they stand in the file.

    Of the first MOST samples: later copies of the clips tell a probe nothing new.
    """
    run = load_run(folder)
    model: Any = run.model
    assert isinstance(model.pretext, LabelFree)
    contrastive: Any = model.pretext.objectives["contrastive"]
    found: list[torch.Tensor] = []
    plain = contrastive._encode

    def keep(*arguments: Any) -> torch.Tensor:
        encoded: torch.Tensor = plain(*arguments)
        found.append(encoded)
        return encoded

    contrastive._encode = keep
    model.fork = None
    model.eval()
    model.training = True  # the objectives run, without dropout
    dataset = SplitDataset(run.catalogue, task="triplets", split=split)
    pack = Packer(run.catalogue, prepare_functions(run.specs))
    with torch.no_grad():
        for first in range(0, min(MOST, len(dataset)), 200):
            model(pack([dataset[item] for item in range(first, min(first + 200, len(dataset), MOST))]))
    return torch.cat(found), np.asarray(dataset.indices)[:MOST]


def scores(folder: Path) -> dict[str, float]:
    """Recall of captions, and of a ridge regression onto the digit, both on the test split."""
    with DataFile(folder / "triplets.h5") as file:
        digit, key = file.targets(), file.targets() * 6 + file.targets("label_motion")
    run = load_run(folder / "run")
    order = list(run.specs)
    (train_NMD, train_N), (test_NMD, test_N) = (encode(folder / "run", split) for split in ("train", "test"))
    video_ND, text_ND = (test_NMD[:, order.index(name)] for name in ("video", "text"))
    kinds, kind_N = np.unique(key[test_N], return_inverse=True)
    nearest_NK = torch.full((len(test_N), len(kinds)), -2.0)
    nearest_NK = nearest_NK.scatter_reduce(
        1, torch.from_numpy(kind_N)[None].expand(len(test_N), -1), video_ND @ text_ND.T, "amax"
    )
    own_N1 = nearest_NK.gather(1, torch.from_numpy(kind_N)[:, None])
    recall = ((nearest_NK > own_N1).sum(1) < 5).float().mean()
    x_NX, y_NC = train_NMD.flatten(1), F.one_hot(torch.from_numpy(digit[train_N])).float()
    ridge_XC = torch.linalg.solve(x_NX.T @ x_NX + torch.eye(x_NX.shape[1]), x_NX.T @ y_NC)
    told_N = (test_NMD.flatten(1) @ ridge_XC).argmax(1).numpy()
    return {RECALL: 100.0 * float(recall), PROBE: 100.0 * float((told_N == digit[test_N]).mean())}


def area(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Under the ROC curve: probability that a positive has the higher score."""
    rank_N = np.argsort(np.argsort(score_N, kind="stable"), kind="stable")
    low = positive_N.sum() * (positive_N.sum() - 1) / 2
    return float((rank_N[positive_N].sum() - low) / (positive_N.sum() * (~positive_N).sum()))


def one_run(job: tuple[Setting, str, int, Path]) -> dict[str, float]:
    """The scores of one run, in a process of its own; those of a run that is done are read from the folder."""
    setting, way, seed, results = job
    done = results / f"{setting.name}-{way}-{seed}.json".replace(" ", "_")
    if done.exists():
        known: dict[str, float] = json.loads(done.read_text(encoding="utf-8"))
        return known
    # Here and not above: who only imports this file is to have no method more.
    register_harmonizer("random_drop", drops="random_drop")(random_drop)
    began, options = time.perf_counter(), WAYS[way]
    with tempfile.TemporaryDirectory() as temporary, open(os.devnull, "w") as nothing:
        folder = Path(temporary)
        wrong = triplets(folder, setting, 1000 + seed)
        loaded = load_config(recipe(folder, setting, options, seed))
        with patched(options.get("patch"), wrong, seed, setting.wrong), _quiet(nothing):
            train(loaded)
        found = scores(folder)
        if options == {"noisy_pairs": "weigh"} and setting.share:
            loss_RP = load_run(folder / "run").model.state_dict()["pretext.objectives.contrastive.noise.loss_RP"]
            seen = (loss_RP[:, 1] >= 0.0).numpy()
            found[FOUND] = area(loss_RP[:, 1].numpy()[seen], wrong[seen])
    done.write_text(json.dumps(found), encoding="utf-8")
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    print(f"{setting.name}, {way}, seed {seed}: {told}; {time.perf_counter() - began:.0f} s", flush=True)
    return found


@contextmanager
def _quiet(nothing: Any) -> Iterator[None]:
    from contextlib import redirect_stderr, redirect_stdout

    with redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def rows_of(found: dict[tuple[Setting, str], list[dict[str, float]]]) -> list[Row]:
    """Scores of each way, and its gain over the plain sum of the same seeds."""
    rows = []
    for (setting, way), results in found.items():
        case = f"{setting.name}: {way}"
        rows += [runs.row(case, name, [one[name] for one in results], unit="%") for name in (RECALL, PROBE)]
        if FOUND in results[0]:
            rows.append(runs.row(case, FOUND, [one[FOUND] for one in results]))
        if way == "plain sum":
            continue
        plain = found[setting, "plain sum"]
        gains = [one[RECALL] - other[RECALL] for one, other in zip(results, plain, strict=True)]
        wanted = setting.wrong == ("text",) and way == "weighed (default)"
        target = TARGETS.get(setting.share) if wanted else None
        rows.append(runs.row(case, "points over the plain sum", gains, target=target))
        wins = statistics.mean(float(gain > 0.0) for gain in gains)
        rows.append(Row(case=case, metric="share of the seeds above the plain sum", value=wins))
        if wanted and setting.share and (setting, "oracle") in found:
            dealt = found[setting, "weights dealt at random"]
            over = [one[RECALL] - other[RECALL] for one, other in zip(results, dealt, strict=True)]
            rows.append(runs.row(case, "points over weights dealt at random", over, target=3.0))
            whole = [one[RECALL] - other[RECALL] for one, other in zip(found[setting, "oracle"], plain, strict=True)]
            share = statistics.mean(gains) / statistics.mean(whole)
            rows.append(Row(case=case, metric="of the way to the oracle", value=share, target=0.5))
    return rows


def main() -> None:
    """Train, score, write results/noisy_pairs.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 16)))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keeps the score of each run, and goes on from those")
    arguments = parser.parse_args()
    start = time.perf_counter()
    os.environ["OMP_NUM_THREADS"] = "1"  # of each process; a run takes all cores otherwise
    cases = [(setting, way) for setting, ways in SETTINGS.items() for way in ways]
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(arguments.processes, spawn) as pool:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [(*case, seed, folder.resolve()) for seed in arguments.seeds for case in cases]
        results = list(pool.map(one_run, jobs))
    found: dict[tuple[Setting, str], list[dict[str, float]]] = {}
    for (setting, way, *_), result in zip(jobs, results, strict=True):
        found.setdefault((setting, way), []).append(result)
    path = record.write("noisy_pairs", rows_of(found), seeds=arguments.seeds, seconds=time.perf_counter() - start)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
