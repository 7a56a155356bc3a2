"""Scores, curves and the facts at the top, from what a run left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moemm.evaluate.metrics import direction
from moemm.observe.chart import Chart
from moemm.observe.history import History
from moemm.observe.page import Cell, Section, heading, notes, panels, table
from moemm.observe.sections.evaluation import Reuse
from moemm.observe.span import duration
from moemm.observe.table import listing, number


def scores_section(summary: Mapping[str, Any], messages: Sequence[str], reuse: Reuse | None) -> Section:
    """Every task beside its baseline, and what a reader should not miss."""
    rows = []
    compared = any(task.get("baseline") for task in summary["tasks"].values())
    for name, task in summary["tasks"].items():
        base = (task.get("baseline") or {}).get("test")
        gain = None if base is None or task["test"] is None else direction(task["metric"]) * (task["test"] - base)
        cells = [
            Cell(text=task["metric"], align="l"),
            Cell(text=number(task["val"])),
            Cell(text=number(task["test"]), strong=True),
            Cell(text=f"{task['n']:,}"),
        ]
        against = [
            Cell(text=number(base), title=(task.get("baseline") or {}).get("model", "")),
            Cell(text="-" if gain is None else f"{gain:+.3f}", strong=gain is not None and gain < 0),
        ]
        rows.append((name, cells + against if compared else cells))
    head = ["task", "metric", "val", "test", "test samples"]
    head += ["scikit-learn, test", "better by"] if compared else []
    lead = "The model on data that it has not seen"
    if compared:
        lead += (
            ", beside the best of four scikit-learn models on the same data. Better by: positive where the model is "
            "ahead, whichever direction the metric has"
        )
    found = [*_losers(summary), *_unused(reuse), *[text for text in messages if "warning:" in text]]
    return Section(
        key="scores",
        title="Scores",
        lead=f"{lead}.",
        body=table(head, rows, label="Scores") + (heading("What stands out") + notes(found) if found else ""),
    )


def _losers(summary: Mapping[str, Any]) -> Iterator[str]:
    for name, task in summary["tasks"].items():
        base = (task.get("baseline") or {}).get("test")
        if base is not None and task["test"] is not None and direction(task["metric"]) * (task["test"] - base) < 0:
            yield f"{name}: scikit-learn is ahead ({number(base)} against {number(task['test'])} {task['metric']})."


def _unused(reuse: Reuse | None) -> list[str]:
    names = [
        expert
        for expert, losses in (reuse or {}).items()
        if losses and all(abs(loss or 0.0) < 0.005 for loss in losses.values())
    ]
    if not names:
        return []
    return [f"No task loses 0.005 or more when one of these experts is switched off: {listing(names)}."]


def curves_section(summary: Mapping[str, Any], history: History) -> Section:
    """Training loss and validation score of each task."""
    parts = []
    for name, task in summary["tasks"].items():
        base = (task.get("baseline") or {}).get("val")
        val = Chart(
            title=f"validation {task['metric']}" + (f"; dashed: scikit-learn {base:.3f}" if base is not None else ""),
            points=history.scores.get(("val", name), []),
            xlabel="step",
            level=None if base is None else (base, "scikit-learn"),
        )
        loss = Chart(title="training loss, mean over samples", points=history.losses.get(name, []), xlabel="step")
        parts.append(heading(name) + loss.svg() + val.svg())
    for name, points in history.objectives.items():
        chart = Chart(title="training loss, mean over the samples that it concerns", points=points, xlabel="step")
        parts.append(heading(f"objective {name}") + chart.svg())
    return Section(
        key="curves",
        title="Curves of each task",
        lead="Above the training loss (with dropout, noise and label smoothing, where the run has them), below the "
        "score on the validation split; the vertical axes differ from task to task.",
        body=panels(parts),
    )


def about(summary: Mapping[str, Any], folder: str, step: int) -> list[tuple[str, str]]:
    """The facts at the top."""
    ranks = summary["world_size"]
    return [
        ("run folder", folder),
        ("trained", f"{summary['steps']:,} steps in {duration(summary['seconds'])}, "
         f"{summary['tokens_per_second']:,.0f} tokens a second, {ranks} rank{'s' if ranks > 1 else ''}, "
         f"ZeRO {summary['zero_stage']}"),
        ("weights", f"of step {step:,}"),
        ("model", f"{summary['params_total']:,} parameters, {summary['params_active']:,} active a token at most"),
        ("configuration", f"hash {summary['config_hash']}; config.yaml in the run folder"),
        ("commit", summary.get("commit") or "not recorded (moemm was not run from a git checkout)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in summary["versions"].items())),
    ]  # fmt: skip
