"""Figures. matplotlib is imported here, inside the functions: it takes seconds, and most commands draw nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, PALE, GREY, INK = "#2f6db3", "#9dbcdc", "#d9d9d9", "#333333"
_PLATE = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # keeps the line of the mean out of a number
_ROW, _HEADER, _FOOTER = 0.24, 1.0, 0.4  # inches: a subset; title and names of a task; the axis under it


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write PATH.png (150 dots an inch) and PATH.svg, and return both. Raises OSError."""
    written = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    figure.savefig(written[0], dpi=150)
    figure.savefig(written[1], metadata={"Date": None})
    return written


def missing_figure(result: Mapping[str, Any]) -> Figure:
    """What evaluate_run with `missing="all"` found: for each task a row a subset, its modalities as dots, its score.

    Tasks of one modality have no subsets to compare and are left out, unless there is no other.
    """
    several = {name: task for name, task in result["tasks"].items() if len(task["modalities"]) > 1}
    tasks = several or result["tasks"]
    widest = max(max(len(task["modalities"]) for task in tasks.values()), 3)
    left, width = 0.3 * widest + 0.6, 0.3 * widest + 5.6
    height = sum(_HEADER + _ROW * len(task["subsets"]) for task in tasks.values()) + _FOOTER * len(tasks)
    figure = new_figure(width, height)
    top = height
    for name, task in tasks.items():
        rows = _ROW * len(task["subsets"])
        top -= _HEADER + rows
        figure.text(0.1 / width, (top + rows + _HEADER - 0.1) / height, name, weight="bold", size=11, va="top")
        columns = 0.3 * len(task["modalities"])
        sets = figure.add_axes((0.2 / width, top / height, columns / width, rows / height))
        scores = figure.add_axes((left / width, top / height, 4.8 / width, rows / height))
        _draw_sets(sets, task)
        _draw_scores(scores, task)
        top -= _FOOTER
    return figure


def _draw_sets(axes: Axes, task: Mapping[str, Any]) -> None:
    names, rows = task["modalities"], task["subsets"]
    for y, row in enumerate(rows):
        there = [x for x, name in enumerate(names) if name in row["present"]]
        axes.plot(there, [y] * len(there), color=INK, linewidth=1.2)
        colours = [INK if x in there else GREY for x in range(len(names))]
        axes.scatter(range(len(names)), [y] * len(names), color=colours, s=28, zorder=3)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="left", rotation_mode="anchor", fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlim(-0.5, len(names) - 0.5)
    _rows(axes, rows)


def _draw_scores(axes: Axes, task: Mapping[str, Any]) -> None:
    rows, mean = task["subsets"], task["mean"]
    values = [row["value"] or 0.0 for row in rows]
    colours = [BLUE if len(row["present"]) == len(task["modalities"]) else PALE for row in rows]
    axes.barh(range(len(rows)), values, height=0.7, color=colours)
    for y, row in enumerate(rows):
        text = "no score" if row["value"] is None else f"{row['value']:.3f}"
        axes.annotate(
            text, (values[y], y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK, bbox=_PLATE
        )
    label = task["metric"]
    if mean is not None and len(rows) > 1:
        label += f"; mean over subsets {'about ' if task['sampled'] else ''}{mean:.3f}"
        axes.axvline(mean, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title(label, loc="left", fontsize=9)
    axes.set_xlim(0.0, 1.12 * max([*values, 1e-9]))
    axes.tick_params(axis="x", labelsize=8)
    _rows(axes, rows)


def _rows(axes: Axes, rows: Sequence[Any]) -> None:
    """One row a subset, the first on top, no frame."""
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    for side in ("left", "right", "top", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
