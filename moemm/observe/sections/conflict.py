"""How the gradients of losses that meet agreed, from what `harmonize` saw of them."""

from __future__ import annotations

from collections.abc import Sequence

from moemm.observe.chart import Chart
from moemm.observe.history import History
from moemm.observe.page import Cell, Section, heading, panels, table

SHOWN = 12
"""Pairs that get a curve: those that oppose each other most often."""


def conflict_section(history: History) -> Section:
    """A line for each two losses, those that oppose each other most often first, and curves of the first of them."""
    order = sorted(history.conflict, key=lambda pair: -_mean([share for _, _, share in history.conflict[pair]]))
    rows = []
    for pair in order:
        points = history.conflict[pair]
        late = points[-max(1, len(points) // 4) :]
        values = [_mean([p[1] for p in points]), _mean([p[2] for p in points]), _mean([p[1] for p in late])]
        share = _mean([p[2] for p in late])
        cells = [Cell(text=f"{values[0]:+.3f}"), Cell(text=f"{values[1]:.0%}", bar=values[1])]
        rows.append((pair, [*cells, Cell(text=f"{values[2]:+.3f}"), Cell(text=f"{share:.0%}", bar=share)]))
    head = ["losses", "cosine", "opposed", "cosine, last quarter", "opposed, last quarter"]
    charts = [
        heading(pair)
        + Chart(
            title="mean cosine of their gradients; dashed: no conflict on average",
            points=[(step, cos) for step, cos, _ in history.conflict[pair]],
            xlabel="step",
            level=(0.0, "0"),
        ).svg()
        for pair in order[:SHOWN]
    ]
    return Section(
        key="conflict",
        title="Conflicts between losses",
        lead="Where two losses read the same tokens, at the end of the trunk: the mean cosine of their gradients, and "
        "how often (of the samples, or of what harmonize.per names) they oppose each other. Gradients that have "
        "nothing to do with each other are opposed half of the time.",
        body=table(head, rows, label="Conflicts") + panels(charts),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
