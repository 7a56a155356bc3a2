"""What a report measures itself: modalities missing, cost, causal reuse."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moemm.evaluate import Cost
from moemm.evaluate.metrics import direction
from moemm.observe.chart import Chart
from moemm.observe.colour import SIDE_STEPS, side
from moemm.observe.page import Cell, Section, heading, panels, paragraph, scale, table
from moemm.observe.table import listing, number

Subsets = Mapping[str, Mapping[tuple[str, ...], float | None]]
"""task -> modalities that are there -> score."""
Reuse = Mapping[str, Mapping[str, float | None]]
"""expert -> task -> what the task loses without it."""
_SHARES = ("accuracy", "macro_f1", "auc", "map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a report measures itself, on one split. sizes: task -> samples."""

    split: str
    sizes: Mapping[str, int]
    cost: Cost
    subsets: Subsets
    reuse: Reuse


def missing_section(summary: Mapping[str, Any], measured: Measured) -> Section:
    """What each task is worth with modalities taken away."""
    parts, single = [], []
    for name, task in summary["tasks"].items():
        found = measured.subsets.get(name, {})
        names = max(found, key=len, default=())
        if len(names) < 2:
            single.append(name)
            continue
        parts.append(heading(f"{name} ({task['metric']})") + _subset_chart(found) + _subset_table(task, found, names))
    body = panels(parts)
    if single:
        body += paragraph(f"One modality only, so nothing to take away: {listing(single)}.")
    return Section(
        key="missing",
        title="With modalities missing",
        lead=f"Scores on the {measured.split} split when samples come with some of their modalities only. Alone: the "
        "score with that modality and no other. Without: the score with all others. Loses: what taking it away costs; "
        "orange is a loss, blue a gain. Chart: mean over the sets of so many modalities, and their range. Samples "
        "that have nothing left are left out.",
        body=body,
    )


def _subset_chart(found: Mapping[tuple[str, ...], float | None]) -> str:
    by_size: dict[int, list[float]] = {}
    for present, value in found.items():
        if value is not None:
            by_size.setdefault(len(present), []).append(value)
    sizes = sorted(by_size)
    return Chart(
        title="score by the number of modalities that are there",
        points=[(size, sum(by_size[size]) / len(by_size[size])) for size in sizes],
        band=[(size, min(by_size[size]), max(by_size[size])) for size in sizes],
        xlabel="modalities",
    ).svg()


def _subset_table(
    task: Mapping[str, Any], found: Mapping[tuple[str, ...], float | None], names: tuple[str, ...]
) -> str:
    full = found[names]
    losses: dict[str, float | None] = {}
    for name in names:
        now = found.get(tuple(other for other in names if other != name))
        losses[name] = None if full is None or now is None else direction(task["metric"]) * (full - now)
    most = _largest(losses.values(), floor=_floor(task["metric"]))
    rows = []
    for name in names:
        without = found.get(tuple(other for other in names if other != name))
        cells = [Cell(text=number(found.get((name,)))), Cell(text=number(without)), _loss_cell(losses[name], most)]
        rows.append((name, cells))
    rows.append(("all", [Cell(text=""), Cell(text=number(full), strong=True), Cell(text="")]))
    return table(["modality", "alone", "without", "loses"], rows, label="Scores with modalities missing")


def cost_section(measured: Measured) -> Section:
    """Tokens and operations of each modality."""
    cost, shares = measured.cost, measured.cost.shares
    tokens = sum(cost.tokens.values())
    parts = list(next(iter(cost.operations.values()), {}))
    rows = []
    for name in sorted(shares, key=lambda one: -shares[one]):
        own, whole = cost.operations[name], sum(cost.operations[name].values())
        cells = [
            Cell(text=f"{cost.tokens[name]:,}"),
            Cell(text=f"{cost.tokens[name] / max(tokens, 1):.1%}", bar=cost.tokens[name] / max(tokens, 1), align="l"),
            Cell(text=f"{shares[name]:.1%}", bar=shares[name], align="l", strong=True),
            Cell(text=f"{whole / max(cost.tokens[name], 1) / 1e6:.3f}"),
            *(Cell(text=f"{own[part] / whole:.0%}" if whole else "-", faint=True) for part in parts),
        ]
        rows.append((name, cells))
    head = ["modality", "tokens", "of all tokens", "of all operations", "MFLOP a token", *parts]
    return Section(
        key="cost",
        title="What each modality costs",
        lead=f"Floating-point operations of a forward pass over the {measured.split} split, counted from shapes and "
        "from where the routers sent the tokens (a multiply-add is two). The right columns split a modality's own "
        "operations. Attention counts a token's products with every token of its sample. Norms, activations, "
        "embeddings and heads are left out.",
        body=table(head, rows, label="Cost of each modality")
        + paragraph(f"{sum(sum(one.values()) for one in cost.operations.values()) / 1e9:.2f} GFLOP in all."),
    )


def reuse_section(summary: Mapping[str, Any], measured: Measured) -> Section:
    """What each task loses without an expert."""
    tasks = summary["tasks"]
    most = {
        name: _largest((losses.get(name) for losses in measured.reuse.values()), floor=_floor(task["metric"]))
        for name, task in tasks.items()
    }
    rows = []
    for expert, losses in measured.reuse.items():
        cells = []
        for name, task in tasks.items():
            if name not in losses:
                cells.append(Cell(text="·", align="c", faint=True, title=f"no modality of {name} may use {expert}"))
                continue
            sure = task["metric"] in _SHARES and abs(losses[name] or 0.0) > chance(measured.sizes[name])
            cells.append(_loss_cell(losses[name], most[name], strong=sure, title=f"{name} without {expert}"))
        rows.append((expert, cells))
    bounds = ", ".join(
        f"{name} {chance(measured.sizes[name]):.3f}" for name, task in tasks.items() if task["metric"] in _SHARES
    )
    body = scale(SIDE_STEPS, "gains", "loses, as much as the task ever does") + table(
        ["switched off", *tasks], rows, label="Causal reuse"
    )
    if bounds:
        body += paragraph(f"Bold: above one standard error of a difference of two scores, at most: {bounds}.")
    return Section(
        key="reuse",
        title="What each task loses without an expert",
        lead=f"Each expert is switched off in all layers that have it, and the {measured.split} split is scored again: "
        "the score with it minus the score without it (the other way round where lower is better). Routers decide as "
        "before; the switched-off expert adds nothing. A row with losses in several columns: an expert that several "
        "tasks share. A row of zeros: nobody would miss it. A dot: no modality of that task may use it.",
        body=body,
    )


def chance(samples: int) -> float:
    """One standard error of the difference of two shares of so many samples each, at most: sqrt(2 x 0.25 / n)."""
    return math.sqrt(0.5 / max(samples, 1))


def _floor(metric: str) -> float:
    """Losses below this are not drawn in the darkest colour, however small the others are."""
    return 0.05 if metric in _SHARES else 0.0


def _largest(losses: Iterable[float | None], *, floor: float) -> float:
    return max([floor, *(abs(loss) for loss in losses if loss is not None)])


def _loss_cell(loss: float | None, most: float, *, strong: bool = False, title: str = "") -> Cell:
    if loss is None:
        return Cell(text="-", align="c", faint=True, title="no score")
    text = f"{loss:+.3f}" if abs(loss) >= 0.0005 else "0"
    shade = loss / most if most > 1e-9 else 0.0
    return Cell(text=text, colour=side(shade), strong=strong, title=f"{title}: loses {loss:.4f}" if title else "")
