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


_LOSSES = (
    ("even", "even work", BLUE),
    ("tokens", "ranks with more tokens", PALE),
    ("experts", "experts with more rows", "#d98a2b"),
    ("jitter", "slower ranks", "#f0cf9b"),
    ("network", "network", "#8c8c8c"),
)
"""Parts of a simulated step: key, what it is, colour."""


def scaling_figure(values: Mapping[str, Any]) -> Figure:
    """What `moemm plan simulate` found: efficiency by ranks, and where the time of a step goes."""
    figure = new_figure(10.0, 4.0)
    efficiency, parts = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.07, right=0.98, bottom=0.14, top=0.86, wspace=0.22)
    for (name, points), style in zip(values["points"].items(), ("-o", "--s"), strict=False):
        label = name if values["ep_size"] > 1 else "every rank has all experts"
        efficiency.plot(
            [one["ranks"] for one in points], [100 * one["efficiency"] for one in points], style,
            color=BLUE if style == "-o" else INK, markersize=4, linewidth=1.5,
            label=f"experts {label}" if values["ep_size"] > 1 else label,
        )  # fmt: skip
    efficiency.set_ylim(0.0, 105.0)
    efficiency.set_ylabel("computing with even work / step, %")
    efficiency.set_title("efficiency of a rank", loc="left", fontsize=10)
    efficiency.legend(loc="lower left", fontsize=8, frameon=False)
    _draw_parts(parts, list(values["points"].values())[-1], list(values["points"])[-1])
    for axes in (efficiency, parts):
        axes.set_xscale("log", base=2)
        ranks = [one["ranks"] for one in values["points"]["in turn"]]
        axes.set_xticks(ranks, [str(rank) for rank in ranks], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(f"ranks ({values['gpus'].partition('x')[2]})")
        for side in ("right", "top"):
            axes.spines[side].set_visible(False)
    return figure


def _draw_parts(axes: Axes, points: Sequence[Mapping[str, Any]], name: str) -> None:
    """Time of a step, its parts above each other."""
    ranks = [one["ranks"] for one in points]
    unit, scale = ("ms", 1e3) if points[-1]["seconds"] < 1 else ("s", 1.0)
    heights = [[scale * one[key] for one in points] for key, _, _ in _LOSSES]
    axes.stackplot(ranks, heights, labels=[text for _, text, _ in _LOSSES], colors=[colour for _, _, colour in _LOSSES])
    axes.set_ylabel(f"step, {unit}")
    axes.set_title(f"where a step's time goes, experts {name}", loc="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    axes.set_ylim(0.0, 1.45 * max(map(sum, zip(*heights, strict=True))))
    axes.legend(handles[::-1], labels[::-1], loc="upper left", fontsize=8, frameon=False, ncols=2)
