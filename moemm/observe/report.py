"""`moemm report`: one HTML file about a finished run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from moemm.checkpoint.files import write_text_atomic
from moemm.errors import CheckpointError
from moemm.evaluate import TrainedRun, causal_reuse, count_cost, evaluate_model, evaluate_subsets
from moemm.evaluate.reuse import plan_of
from moemm.models import Model
from moemm.observe import sections as part
from moemm.observe.conflict_file import read_conflict
from moemm.observe.history import History
from moemm.observe.page import Section, facts, page, paragraph

SUMMARY, METRICS, MISSING = "summary.json", "metrics.jsonl", "missing.csv"
_KEYS = ("name", "tasks", "steps", "seconds", "tokens_per_second", "params_total", "params_active", "config_hash",
         "versions", "world_size", "zero_stage")  # fmt: skip
Tell = Callable[[str], None]


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run. Raises CheckpointError where the run has not finished, or the file is damaged."""
    path = folder / SUMMARY
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {SUMMARY}: the run has not finished. Go on with it: moemm train {folder / 'config.yaml'} "
            f"--train.output {folder} --resume. TensorBoard shows a run that goes on: tensorboard --logdir {folder}"
        )
    try:
        summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lacking = [key for key in _KEYS if key not in summary]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); put it back from a copy") from error
    if lacking:
        raise CheckpointError(f"{path} lacks {', '.join(lacking)}: it is not the summary of a run; put it back")
    return summary


def build_report(
    run: TrainedRun, *, quick: bool = False, split: str = "test", tell: Tell = lambda text: None
) -> str:  # fmt: skip
    """The report as HTML. run: as load_run gives it; with `quick` the model's weights are not looked at.

    quick: leave out what needs evaluation (missing modalities, cost, reuse), which takes some evaluations a modality
    and one an expert. tell: is given a line now and then. Raises CheckpointError for a run that has not finished.
    """
    summary = read_summary(run.folder)
    history = History.read(run.folder / METRICS)
    measured = None if quick else measure(run, split=split, tell=tell)
    top = facts(part.about(summary, str(run.folder), run.step))
    if quick:
        top += paragraph("Made with --quick: missing modalities, cost and reuse, which need evaluation, are left out.")
    return page(
        f"{summary['name']}: report of a run",
        top,
        _sections(cast(Model, run.model), summary, history, measured, read_conflict(run.folder)),
        footer="Written by moemm report. docs/report.md says what each figure means.",
    )


def write_report(html: str, path: Path) -> None:
    """Write the page as a whole. Raises CheckpointError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, html)
    except OSError as error:
        raise CheckpointError(f"--output: cannot write {path}: {error.strerror or error}") from error


def measure(run: TrainedRun, *, split: str = "test", tell: Tell = lambda text: None) -> part.Measured:
    """Everything in a report that needs evaluation."""
    plan = plan_of(run, split)
    tell(f"scoring the {split} split")
    with count_cost(cast(Model, run.model)) as cost:
        full = evaluate_model(run.model, run.catalogue, plan)
    subsets = read_missing(run.folder / MISSING, split) or _subsets(run, split, tell)
    sizes = {name: score.n for name, score in full.items()}
    reuse = causal_reuse(run, full, split=split, tell=tell)
    return part.Measured(split=split, sizes=sizes, cost=cost, subsets=subsets, reuse=reuse)


def read_missing(path: Path, split: str) -> part.Subsets:
    """What `moemm evaluate --missing all` left in the run folder for a split; empty where there is none.

    Raises CheckpointError for a file of that name that is something else.
    """
    if not path.is_file():
        return {}
    found: dict[str, dict[tuple[str, ...], float | None]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                present = tuple(row["present"].split("+"))
                if len(present) != int(row["count"]):
                    raise ValueError(f"{row['present']} are not {row['count']} modalities")
                if row["split"] == split:
                    found.setdefault(row["task"], {})[present] = float(row["value"]) if row["value"] else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as scores with modalities missing ({type(error).__name__}: {error}); delete it, "
            "and they are measured anew"
        ) from error
    return found


def _subsets(run: TrainedRun, split: str, tell: Tell) -> part.Subsets:
    tell("scoring every task with modalities missing")
    found = evaluate_subsets(run.model, run.catalogue, plan_of(run, split))
    return {
        name: {tuple(row["present"]): row["value"] for row in task["subsets"]} for name, task in found.items()
    }  # fmt: skip


def _sections(
    model: Model,
    summary: dict[str, Any],
    history: History,
    measured: part.Measured | None,
    conflict: dict[str, Any] | None,
) -> list[Section]:
    reuse = measured.reuse if measured is not None else None
    found = [part.scores_section(summary, history.messages, reuse), part.map_section(model)]
    if history.names is not None and history.routing:
        found += [part.heatmap_section(history.names, history), part.time_section(history.names, history)]
    found.append(part.curves_section(summary, history))
    if history.conflict or history.loss_weights:
        found.append(part.conflict_section(history))
    if conflict is not None:
        found.append(part.pull_section(conflict))
    if summary.get("noisy_pairs"):
        found.append(part.noise_section(summary["noisy_pairs"]))
    if measured is not None:
        found += [part.missing_section(summary, measured), part.cost_section(measured)]
        if measured.reuse:
            found.append(part.reuse_section(summary, measured))
    return found
