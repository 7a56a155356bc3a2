"""What a run is worth whatever is missing: the score of every task for each subset of its modalities.

Up to MAX_WHOLE modalities all 2^M - 1 subsets are scored. Above it the complete set, those that lack one, the single
ones, and NUM_DRAWN of the rest, drawn evenly and the same on every machine. M modalities of one task.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.evaluate.scoring import EvaluationPlan, evaluate_model

if TYPE_CHECKING:
    from rich.table import Table

MAX_WHOLE, NUM_DRAWN = 6, 48
Subset = tuple[str, ...]
TaskResult = dict[str, Any]


def subsets(names: Sequence[str]) -> list[Subset]:
    """The subsets to score, larger ones first; each has its names in the order of `names`."""
    if len(names) <= MAX_WHOLE:
        return [chosen for size in range(len(names), 0, -1) for chosen in combinations(names, size)]
    sizes = _fixed_sizes(len(names))
    fixed = [chosen for size in sizes for chosen in combinations(names, size)]
    random, drawn = np.random.Generator(np.random.PCG64(0)), set[Subset]()
    while len(drawn) < NUM_DRAWN:
        chosen = tuple(name for name, there in zip(names, random.random(len(names)) < 0.5, strict=True) if there)
        if len(chosen) not in (0, *sizes):
            drawn.add(chosen)
    place = {name: number for number, name in enumerate(names)}
    return sorted([*fixed, *drawn], key=lambda chosen: (-len(chosen), [place[name] for name in chosen]))


def mean_over_subsets(values: Mapping[Subset, float | None], num_modalities: int) -> float | None:
    """Mean over all 2^M - 1 subsets; None without a score.

    Each size counts as often as there are subsets of it, so that those which were drawn stand for the rest of theirs.
    """
    by_size: dict[int, list[float]] = {}
    for subset, value in values.items():
        if value is not None:
            by_size.setdefault(len(subset), []).append(value)
    weights = {size: comb(num_modalities, size) for size in by_size}
    total = sum(weights.values())
    return sum(weights[size] * fmean(found) for size, found in by_size.items()) / total if total else None


def evaluate_subsets(model: nn.Module, catalogue: Catalogue, plan: EvaluationPlan) -> dict[str, TaskResult]:
    """task -> {"metric", "modalities", "mean", "complete", "sampled", "subsets": [{"present", "value", "n"}]}.

    value: None where a subset leaves no sample, or none that the metric can score. n: samples that have at least one
    modality of the subset. sampled: whether the subsets are not all there are.
    """
    return {task.name: _task(model, catalogue, task, plan) for task in catalogue.tasks}


def _task(model: nn.Module, catalogue: Catalogue, task: TaskInfo, plan: EvaluationPlan) -> TaskResult:
    rows: list[dict[str, Any]] = []
    for present in subsets(task.modalities):
        drop = [name for name in task.modalities if name not in present]
        score = evaluate_model(model, catalogue, replace(plan, drop=drop, tasks=[task.name]))[task.name]
        rows.append({"present": list(present), "value": score.value, "n": score.n})
    values = {tuple(row["present"]): row["value"] for row in rows}
    return {
        "metric": task.metric,
        "modalities": list(task.modalities),
        "mean": mean_over_subsets(values, len(task.modalities)),
        "complete": values[task.modalities],
        "sampled": len(task.modalities) > MAX_WHOLE,
        "subsets": rows,
    }


def subsets_csv(result: Mapping[str, Any]) -> str:
    """The scores as CSV, a line a task and subset: task, split, metric, present (joined by +), count, value, n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "split", "metric", "present", "count", "value", "n"])
    for name, task in result["tasks"].items():
        for row in task["subsets"]:
            present = row["present"]
            writer.writerow(
                [name, result["split"], task["metric"], "+".join(present), len(present), row["value"], row["n"]]
            )
    return text.getvalue()


def render_subsets(result: Mapping[str, Any]) -> Table:
    """The scores as a table for the terminal; behind each task the mean over its subsets."""
    from rich.table import Table

    title = f"{result['run']}, step {result['step']}: {result['split']} split, by the modalities that are there"
    table = Table(title=title, title_justify="left")
    for column in ("task", "metric", "present"):
        table.add_column(column)
    for column in ("score", "less complete", "samples"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, task in result["tasks"].items():
        for number, row in enumerate(_rows(task)):
            heads = (name, task["metric"]) if number == 0 else ("", "")
            style = "bold" if row.text.startswith("mean over") else None
            table.add_row(*heads, row.text, *_cells(row.value, task["complete"]), row.samples, style=style)
        table.add_section()
    return table


class _Row(NamedTuple):
    """A line of the table: which modalities are there, the score, on how many samples."""

    text: str
    value: float | None
    samples: str


def _rows(task: TaskResult) -> Iterator[_Row]:
    """A line a subset; where subsets were drawn, those are one line a size: a screen holds no hundred lines."""
    names = task["modalities"]
    drawn: dict[int, list[float | None]] = {}
    for row in task["subsets"]:
        count = len(row["present"])
        if task["sampled"] and count not in _fixed_sizes(len(names)):
            drawn.setdefault(count, []).append(row["value"])
        else:
            yield _Row(_present(names, row["present"]), row["value"], str(row["n"]))
    for count, values in drawn.items():
        known = [value for value in values if value is not None]
        text = f"{count} of {len(names)}, mean of {len(values)} drawn"
        yield _Row(text, fmean(known) if known else None, "")
    if len(names) > 1:
        over = f"mean over {2 ** len(names) - 1:,} subsets{' (est.)' if task['sampled'] else ''}"
        yield _Row(over, task["mean"], "")


def _present(names: Sequence[str], present: Sequence[str]) -> str:
    missing = [name for name in names if name not in present]
    if not missing:
        return "all"
    return ", ".join(present) if len(present) <= len(missing) or len(missing) > 2 else f"all but {', '.join(missing)}"


def _cells(value: float | None, complete: float | None) -> tuple[str, str]:
    if value is None:
        return "no score", ""
    return f"{value:.3f}", "" if complete is None else f"{value - complete:+.3f}"


def _fixed_sizes(num_modalities: int) -> tuple[int, ...]:
    """Sizes of which every subset is scored, whatever M is."""
    return num_modalities, num_modalities - 1, 1
