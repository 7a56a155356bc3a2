"""Where the routers sent the tokens: at the end of the run, and over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from moemm.observe.colour import LEVEL_STEPS, SIDE_STEPS, level, side
from moemm.observe.history import History
from moemm.observe.page import Cell, Section, flow, heading, paragraph, scale, table
from moemm.observe.routing import RouterReport, RoutingNames

RECENT = 0.2
"""Share of the run, at its end, that the heat maps are taken from."""
BINS = 12


def heatmap_section(names: RoutingNames, history: History) -> Section:
    """Modality x expert, of each layer, at the end of the run."""
    recent = history.recent(RECENT)
    assert recent is not None
    first, report = recent
    rows = np.flatnonzero(report.tokens_M > 0).tolist()
    return Section(
        key="routing",
        title="Which modality uses which routed expert",
        lead=f"Share of a modality's choices that fell on each routed expert, in percent, from step {first} to the "
        "end. A row sums to 100. Rows that differ: the experts have specialised by modality. One dark cell in a row "
        "and nothing beside it: that modality keeps to one expert. A pale column: an expert that few tokens use.",
        body=scale(LEVEL_STEPS, "0 %", "100 %")
        + flow(_heatmap(names, report, rows, number_) for number_ in range(len(names.layers))),
    )


def _heatmap(names: RoutingNames, report: RouterReport, rows: Sequence[int], layer: int) -> str:
    even_M = report.evenness_LM(names.allowed_LME)[layer]
    dropped_M, any_dropped = report.dropped_share_LM[layer], report.dropped_LM.any()
    usable = np.flatnonzero(names.allowed_LME[layer].any(0)).tolist()
    found = []
    for row in rows:
        cells = [_load_cell(names, report, layer, row, expert) for expert in usable]
        cells.append(_evenness_cell(even_M[row]))
        if any_dropped:
            cells.append(Cell(text=f"{100 * dropped_M[row]:.1f}", title="slots that found no room, %"))
        found.append((names.rows[row], cells))
    head = ["modality", *(names.experts[expert] for expert in usable), "evenness"]
    title = f"Layer {names.layers[layer]}"
    return heading(title) + table([*head, *(["dropped"] if any_dropped else [])], found, label=f"Routing, {title}")


def _load_cell(names: RoutingNames, report: RouterReport, layer: int, row: int, expert: int) -> Cell:
    who, what = names.rows[row], names.experts[expert]
    if not names.allowed_LME[layer, row, expert]:
        return Cell(text="·", align="c", faint=True, title=f"{who} may not use {what}")
    share, prob = report.share_LME[layer, row, expert], report.mean_prob_LME[layer, row, expert]
    title = f"{who} to {what}: {share:.1%} of its choices, mean probability {prob:.3f}"
    return Cell(text=f"{100 * share:.0f}", colour=level(float(share)), title=title)


def _evenness_cell(value: float) -> Cell:
    return Cell(text="-" if math.isnan(value) else f"{value:.2f}", faint=True)


def time_section(names: RoutingNames, history: History) -> Section:
    """Load of each expert and evenness of each modality over the run."""
    steps, reports = _binned(history)
    layers = range(len(names.layers))
    return Section(
        key="time",
        title="Routing over time",
        lead="Columns are stretches of the run. Load: percent of all choices of a layer; ✕ marks an expert that no "
        "token chose. Evenness: 1 where a modality spreads its tokens evenly over the experts that it may use, 0 "
        "where it uses as few as it can; it is the entropy of the load between these two ends. It falls while a "
        "modality settles on its experts; at 0 it has collapsed onto them.",
        body=heading("Load of each expert")
        + scale(SIDE_STEPS, "a quarter of an even load or less", "four times as much or more")
        + flow(_load_table(names, steps, reports, layer) for layer in layers)
        + heading("Evenness of each modality")
        + scale(LEVEL_STEPS, "1, even", "0, as few experts as possible")
        + flow(_evenness_table(names, steps, reports, layer) for layer in layers),
    )


def _load_table(names: RoutingNames, steps: Sequence[str], reports: Sequence[RouterReport], layer: int) -> str:
    share_XE = np.stack([report.layer_share_LE[layer] for report in reports])
    dead_XE = np.stack([report.dead_LE(names.allowed_LME)[layer] for report in reports])
    rows = []
    usable = np.flatnonzero(names.allowed_LME[layer].any(0)).tolist()
    for expert in usable:
        pairs = zip(share_XE[:, expert], dead_XE[:, expert], strict=True)
        cells = [_time_cell(share, dead, even=1 / len(usable)) for share, dead in pairs]
        rows.append((names.experts[expert], cells))
    title = f"Load of each expert, layer {names.layers[layer]}"
    return heading(f"Layer {names.layers[layer]}") + table(["expert, up to step", *steps], rows, label=title)


def _evenness_table(names: RoutingNames, steps: Sequence[str], reports: Sequence[RouterReport], layer: int) -> str:
    even_XM = np.stack([report.evenness_LM(names.allowed_LME)[layer] for report in reports])
    rows = [
        (name, [_even_cell(value) for value in even_XM[:, row]])
        for row, name in enumerate(names.rows)
        if np.isfinite(even_XM[:, row]).any()
    ]
    title = f"Evenness of each modality, layer {names.layers[layer]}"
    if rows:
        return heading(f"Layer {names.layers[layer]}") + table(["modality, up to step", *steps], rows, label=title)
    why = "No modality has a choice here: each may use no more routed experts than the router picks."
    return heading(f"Layer {names.layers[layer]}") + paragraph(why)


def _binned(history: History) -> tuple[list[str], list[RouterReport]]:
    """Last steps and sums of at most BINS stretches of the run."""
    chunks = [chunk for chunk in np.array_split(np.arange(len(history.routing)), BINS) if len(chunk)]
    reports = []
    for chunk in chunks:
        total = history.routing[chunk[0]][1]
        for index in chunk[1:]:
            total = total + history.routing[index][1]
        reports.append(total)
    return [str(history.routing[chunk[-1]][0]) for chunk in chunks], reports


def _time_cell(share: float, dead: bool, *, even: float) -> Cell:
    if dead:
        return Cell(text="✕", colour=side(-1.0), align="c", strong=True, title="no token chose it")
    times = share / even
    shade = math.log2(max(times, 1e-6)) / 2
    return Cell(text=f"{100 * share:.0f}", colour=side(shade), align="c", title=f"{times:.2f} times an even load")


def _even_cell(value: float) -> Cell:
    if math.isnan(value):
        return Cell(text="·", align="c", faint=True, title="no token, or no choice")
    return Cell(text=f"{value:.2f}", colour=level(1.0 - float(value)), align="c")
