"""How the gradients of losses that meet agreed, from what `harmonize` saw of them."""

from __future__ import annotations

from collections.abc import Sequence

from moemm.observe.chart import Chart
from moemm.observe.history import History
from moemm.observe.page import Cell, Section, heading, panels, table

SHOWN = 12
"""Pairs that get a curve: those that oppose each other most often."""
_LEAD = (
    "Where two losses read the same tokens, at the end of the trunk (with harmonize.at trunk: where they share "
    "parameters): the mean cosine of their gradients, and how often (of the samples, or of what harmonize.per names; "
    "at the trunk, of the steps) they oppose each other. Gradients that have nothing to do with each other are opposed "
    "half of the time. "
)
_WEIGHTS_LEAD = "Weights are those that harmonize.scale gives the losses of a batch; they sum to the number of losses."


def conflict_section(history: History) -> Section:
    """What opposes what, and what the losses weigh, as far as the run looked at it."""
    parts = [_pairs(history)] if history.conflict else []
    parts += [_weights(history)] if history.loss_weights else []
    return Section(
        key="conflict",
        title="Conflicts between losses" if history.conflict else "Weights of losses",
        lead=(_LEAD if history.conflict else "") + (_WEIGHTS_LEAD if history.loss_weights else ""),
        body="".join(parts),
    )


def _weights(history: History) -> str:
    """A line and a curve for each loss, in the order of the run."""
    rows, charts = [], []
    for name, points in history.loss_weights.items():
        values = [weight for _, weight in points]
        shown = [values[0], _mean(values), values[-1]]
        rows.append((name, [Cell(text=f"{value:.3f}") for value in shown]))
        chart = Chart(title="dashed: all losses alike", points=points, xlabel="step", level=(1.0, "1"))
        charts.append(heading(f"weight of {name}") + chart.svg())
    return table(["loss", "first weight", "mean", "last"], rows, label="Weights of losses") + panels(charts)


def _pairs(history: History) -> str:
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
    return table(head, rows, label="Conflicts") + panels(charts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
