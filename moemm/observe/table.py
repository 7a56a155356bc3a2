"""The table at the end of a run: every task with its metric on val and test, and the baseline beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from moemm.evaluate.metrics import direction
from moemm.observe.span import duration


def results_table(summary: Mapping[str, Any]) -> Table:
    """A table of summary["tasks"]; green where test meets the scikit-learn baseline, yellow where it does not."""
    title = f"{summary['name']}: {summary['steps']} steps in {duration(summary['seconds'])}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    for column in ("val", "test", "samples", "scikit-learn"):
        table.add_column(column, justify="right")
    for name, task in summary["tasks"].items():
        baseline = (task.get("baseline") or {}).get("test")
        table.add_row(
            name,
            task["metric"],
            number(task["val"]),
            f"[{_colour(task, baseline)}]{number(task['test'])}[/]",
            str(task["n"]),
            number(baseline),
        )
    return table


def _colour(task: Mapping[str, Any], baseline: float | None) -> str:
    if baseline is None or task["test"] is None:
        return "default"
    sign = direction(task["metric"])
    return "green" if sign * task["test"] >= sign * baseline else "yellow"


def number(value: float | None) -> str:
    """Three digits behind the point, or a dash where there is no value."""
    return "-" if value is None else f"{value:.3f}"


def listing(names: Sequence[str], most: int = 12) -> str:
    """`a, b, c`, or the first of them and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
