"""What a finished run leaves behind: scores of both splits, baselines beside them, summary.json."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moemm.checkpoint.files import write_text_atomic
from moemm.checkpoint.manifest import versions
from moemm.config import config_hash
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.dataset import SplitDataset
from moemm.data.labels import labelled_items
from moemm.errors import MoemmError
from moemm.evaluate import baseline
from moemm.train.noisy import suspects
from moemm.train.setup import SUMMARY, Setup
from moemm.train.trainer import Scores, Trainer

BASELINE_LIMIT = 20_000
"""Training samples above which no scikit-learn baseline is fitted: it would take longer than a coffee."""
_BASELINES = ".baselines"


def summarize(trainer: Trainer, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The summary of a finished run; scores: split -> task -> score. Fits baselines that are not cached (rank 0)."""
    setup = trainer.setup
    wanted = setup.config.train.baselines
    if wanted:
        trainer.tell("fitting scikit-learn on the same data, to compare with (once a data set) ...")
    found = {task.name: cached_baseline(setup, task) if wanted else None for task in setup.catalogue.tasks}
    seconds = max(trainer.seconds, 1e-9)
    total, active = trainer.num_parameters
    return {
        "name": setup.config.name,
        "tasks": {
            name: {
                "metric": score["metric"],
                "val": scores["val"][name]["value"],
                "test": score["value"],
                "n": score["n"],
                "baseline": found[name],
            }
            for name, score in scores["test"].items()
        },
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 3),
        "tokens_per_second": round(trainer.tokens / seconds, 1),
        "params_total": total,
        "params_active": active,
        "world_size": trainer.world.size,
        "zero_stage": setup.config.deepspeed.zero_stage,
        "config_hash": config_hash(setup.config),
        "versions": versions(),
        "commit": source_commit(),
        "noisy_pairs": suspects(trainer.pretext, setup.catalogue.tasks),
    }


def source_commit() -> str | None:
    """Commit of the checkout that moemm runs from, `-dirty` behind it where files differ; None where it is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json as a whole."""
    write_text_atomic(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def cached_baseline(setup: Setup, task: TaskInfo) -> dict[str, Any] | None:
    """{"model", "val", "test"} of scikit-learn on this task, or None where the data is too large for it.

    Kept in .baselines/ beside the run folder, so that the next run on the same file has it at once.
    """
    if task.sizes["train"] > BASELINE_LIMIT:
        return None
    chosen = _labelled(setup, task)
    path = setup.folder.parent / _BASELINES / f"{task.name}-{_key(setup.catalogue, task, chosen)}.json"
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    except (OSError, ValueError):
        pass
    found = _fit(setup.catalogue, task, chosen)
    if found is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, json.dumps(found) + "\n")
        except OSError:
            pass  # a cache that cannot be written costs seconds, no results
    return found


def _fit(catalogue: Catalogue, task: TaskInfo, chosen: np.ndarray | None) -> dict[str, Any] | None:
    splits = {}
    for split in ("train", "val", "test"):
        dataset = SplitDataset(catalogue, task=task.name, split=split)
        items = range(len(dataset)) if split != "train" or chosen is None else chosen.tolist()
        splits[split] = [dataset[item] for item in items]
    try:
        return baseline(task, catalogue.modalities, splits)
    except (ImportError, ValueError, MoemmError):
        return None  # scikit-learn is not installed, or cannot learn from such data (one class, say)


def _labelled(setup: Setup, task: TaskInfo) -> np.ndarray | None:
    """The training items whose labels the run may use, if not all: the baseline gets the same."""
    share = setup.config.data.label_share
    if share >= 1.0:
        return None
    found = labelled_items(setup.catalogue, share=share, seed=setup.config.train.seed)
    return found[setup.catalogue.tasks.index(task)]


def _key(catalogue: Catalogue, task: TaskInfo, chosen: np.ndarray | None) -> str:
    status = Path(task.file).stat()
    infos = [repr(info) for info in catalogue.modalities if info.name in task.modalities]
    text = repr((status.st_size, status.st_mtime_ns, task.label, task.metric, task.sizes, infos))
    labelled = b"" if chosen is None else chosen.tobytes()
    return hashlib.sha256(text.encode() + labelled).hexdigest()[:16]
