"""Predictions in short: how many, how fast, the share of each class or the spread of values, scores by the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moemm.data.limits import printable
from moemm.evaluate.answers import class_of
from moemm.evaluate.given import FilePredictions

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

_SHOWN = 20
"""Classes that the table has a row for; the JSON has all."""


def summarize(found: FilePredictions) -> dict[str, Any]:
    """As JSON types: what was read, samples and rate, `classes` or `values`, and `scores` where there are labels."""
    task, matched = found.task, found.matched
    count = len(found.index)
    values: dict[str, Any] = {
        "run": str(found.run), "step": found.step, "task": task.name, "target": task.target, "data": found.data,
        "split": found.split, "samples": count, "without_modality": found.skipped, "seconds": round(found.seconds, 3),
        "samples_per_second": round(count / found.seconds, 1), "modalities": list(matched.names),
        "absent": list(matched.absent), "not_read": list(matched.unread),
    }  # fmt: skip
    key = "values" if task.target == "regression" else "classes"
    values[key] = _values(found) if task.target == "regression" else _classes(found)
    return {**values, "scores": found.metrics(), "unlabelled": found.unlabelled or None}


def _classes(found: FilePredictions) -> list[dict[str, Any]]:
    """Of each class or label: samples that it is predicted for, its mean probability, and how many the file says."""
    task, chosen, mean_C = found.task, found.chosen, found.scores.mean(0)
    count_C = _counts(chosen, task.outputs)
    known_C = None if found.targets is None else _counts(found.targets, task.outputs)
    return [
        {
            "name": class_of(task, number),
            "samples": int(count_C[number]),
            "share": float(count_C[number] / len(chosen)),
            "mean_probability": float(mean_C[number]),
            **({} if known_C is None else {"labelled": int(known_C[number])}),
        }
        for number in range(task.outputs)
    ]


def _counts(values: np.ndarray, outputs: int) -> np.ndarray:
    """(C,) samples of each class, or with each label."""
    return np.bincount(values, minlength=outputs) if values.ndim == 1 else (values > 0).sum(0)


def _values(found: FilePredictions) -> list[dict[str, Any]]:
    """Of each target column the mean, deviation, least and most of what is predicted, and the mean of the labels."""
    columns = found.outputs.T
    known = None if found.targets is None else found.targets.reshape(len(found.index), -1).T
    return [
        {
            "column": number,
            "mean": float(column.mean()),
            "deviation": float(column.std()),
            "least": float(column.min()),
            "most": float(column.max()),
            **({} if known is None else {"labelled_mean": float(known[number].mean())}),
        }
        for number, column in enumerate(columns)
    ]


def render_predictions(summary: dict[str, Any]) -> Group:
    """A summary as a table for the terminal, and lines below."""
    from rich.console import Group
    from rich.text import Text

    which = "all samples" if summary["split"] == "all" else f"{summary['split']} split"
    title = f"{summary['run']}, step {summary['step']}: task {summary['task']} on {summary['data']}, {which}"
    table = _value_table(summary) if "values" in summary else _class_table(summary)
    return Group(Text(title), table, *(Text(line) for line in _lines(summary)))


def _class_table(summary: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table, rows = Table(), sorted(summary["classes"], key=lambda row: -row["samples"])
    labelled = "labelled" in rows[0]
    table.add_column("label" if summary["target"] == "multilabel" else "class")
    for title in ("predicted", "share", "mean probability", *(["in the file"] if labelled else [])):
        table.add_column(title, justify="right")
    for row in rows[:_SHOWN]:
        cells = [str(row["samples"]), f"{row['share']:.1%}", f"{row['mean_probability']:.3f}"]
        table.add_row(Text(printable(row["name"], limit=40)), *cells, *([str(row["labelled"])] if labelled else []))
    if len(rows) > _SHOWN:
        rest = rows[_SHOWN:]
        samples, share = sum(row["samples"] for row in rest), sum(row["share"] for row in rest)
        cells = [f"and {len(rest)} more", str(samples), f"{share:.1%}", ""]
        table.add_row(*cells, *([str(sum(row["labelled"] for row in rest))] if labelled else []))
    return table


def _value_table(summary: dict[str, Any]) -> Table:
    from rich.table import Table

    table, rows = Table(), summary["values"]
    keys = [key for key in rows[0] if key != "column"]
    table.add_column("predicted" if len(rows) == 1 else "column")
    for key in keys:
        table.add_column("mean in the file" if key == "labelled_mean" else key, justify="right")
    for row in rows[:_SHOWN]:
        name = "value" if len(rows) == 1 else str(row["column"])
        table.add_row(name, *(f"{row[key]:.4g}" for key in keys))
    if len(rows) > _SHOWN:
        table.add_row(f"and {len(rows) - _SHOWN} more")
    return table


def _lines(summary: dict[str, Any]) -> list[str]:
    rate = f"{summary['samples']} in {summary['seconds']:.2f} s, {summary['samples_per_second']:,.0f} a second"
    if summary["without_modality"]:
        rate += f"; no prediction for {summary['without_modality']}, which have none of these modalities"
    absent = f"; without {', '.join(summary['absent'])}" if summary["absent"] else ""
    lines = [f"samples     {rate}", f"modalities  {', '.join(summary['modalities'])}{absent}"]
    if summary["not_read"]:
        lines.append(f"not read    {', '.join(summary['not_read'])}: the task was trained without")
    lines += [f"{name:<11} {value:.3f}, by the labels of the file" for name, value in summary["scores"].items()]
    if summary["unlabelled"]:
        lines.append(f"no score    {summary['unlabelled']}")
    return lines
