"""The sections of a run's report, each from plain values; what they are collected from is in report.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moemm.evaluate import Cost
from moemm.evaluate.metrics import direction
from moemm.models import Model
from moemm.moe import Expert, ExpertMap
from moemm.observe.chart import Chart
from moemm.observe.colour import level, side
from moemm.observe.expert_layers import ExpertLayers, expert_layers, layers_title
from moemm.observe.history import History
from moemm.observe.page import Cell, Section, flow, heading, notes, panels, paragraph, scale, table
from moemm.observe.routing import RouterReport, RoutingNames, row_name
from moemm.observe.table import duration, number

RECENT = 0.2
"""Share of the run, at its end, that the heat maps are taken from."""
BINS = 12
Subsets = Mapping[str, Mapping[tuple[str, ...], float | None]]
"""task -> modalities that are there -> score."""
Reuse = Mapping[str, Mapping[str, float | None]]
_LEVELS = [level(step / 6) for step in range(7)]
_SIDES = [side(step / 3 - 1) for step in range(7)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a report measures itself, on one split. sizes: task -> samples."""

    split: str
    sizes: Mapping[str, int]
    cost: Cost
    subsets: Subsets
    reuse: Reuse


def scores_section(summary: Mapping[str, Any], messages: Sequence[str], reuse: Reuse | None) -> Section:
    """Every task beside its baseline, and what a reader should not miss."""
    rows = []
    for name, task in summary["tasks"].items():
        base = (task.get("baseline") or {}).get("test")
        gain = None if base is None or task["test"] is None else direction(task["metric"]) * (task["test"] - base)
        cells = [
            Cell(text=task["metric"], align="l"),
            Cell(text=number(task["val"])),
            Cell(text=number(task["test"]), strong=True),
            Cell(text=f"{task['n']:,}"),
            Cell(text=number(base), title=(task.get("baseline") or {}).get("model", "")),
            Cell(text="-" if gain is None else f"{gain:+.3f}", strong=gain is not None and gain < 0),
        ]
        rows.append((name, cells))
    head = ["task", "metric", "val", "test", "test samples", "scikit-learn, test", "better by"]
    found = [*_losers(summary), *_unused(reuse), *[text for text in messages if "warning:" in text]]
    return Section(
        key="scores",
        title="Scores",
        lead="The model on data that it has not seen, beside the best of four scikit-learn models on the same data. "
        "Better by: positive where the model is ahead, whichever direction the metric has.",
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
    return [f"No task loses 0.005 or more when one of these experts is switched off: {_list(names)}."]


def map_section(model: Model) -> Section:
    """Who may use what, layer by layer, with parameters."""
    if model.config.moe != "sparse":
        body = paragraph("This model is dense: one network in each layer, for all tokens.")
    else:
        body = "".join(map(_layer_table, expert_layers(model)))
    total = model.num_parameters()[0]
    rows = []
    for modality, task in model.map.rows:
        active = model.active_parameters(modality, task)
        rows.append(
            (
                row_name(modality, task),
                [Cell(text=f"{active:,}"), Cell(text=f"{active / total:.0%}", bar=active / total)],
            )
        )
    body += heading(f"Parameters that a token passes through, of {total:,} in all")
    body += table(["modality", "active", "share of all"], rows, label="Active parameters of each modality")
    return Section(
        key="map",
        title="Who may use which expert",
        lead="A row is a modality, a column an expert. ●: every token of that modality passes through it. ○: the "
        "router may send tokens there. Experts that are alike share a column. Active parameters include the "
        "modality's tokenizer and the largest head, at the most that the router may choose.",
        body=body,
    )


def _layer_table(layers: ExpertLayers) -> str:
    here = layers.map
    assert here is not None, "every layer of a sparse model has experts"
    columns = _columns(here, layers.experts)
    heads = [_head(group, here) for group in columns]
    facts: dict[str, list[str]] = {
        "kind": [group[0].kind for group in columns],
        "parameters each": [f"{layers.experts[group[0].id]:,}" for group in columns],
    }
    rows = [(name, [Cell(text=text, align="c", faint=True) for text in texts]) for name, texts in facts.items()]
    for modality, task in here.rows:
        name = row_name(modality, task)
        rows.append((name, [_right(name, group, modality, task) for group in columns]))
    title = layers_title(layers.numbers).capitalize()
    return heading(title) + table(["modality", *heads], rows, label=f"Expert map, {title}")


def _columns(layer_map: ExpertMap, sizes: Mapping[str, int]) -> list[list[Expert]]:
    """Experts beside each other in one column: alike and for the same rows, or alike and each for rows of its own."""
    columns: list[list[Expert]] = []
    for expert in layer_map.experts:
        last = columns[-1] if columns else []
        if last and _likeness(last[0], sizes) == _likeness(expert, sizes):
            own, before = _rows(expert, layer_map), [_rows(other, layer_map) for other in last]
            if all(own == other for other in before) or all(not own & other for other in before):
                last.append(expert)
                continue
        columns.append([expert])
    return columns


def _likeness(expert: Expert, sizes: Mapping[str, int]) -> tuple[str, str, int]:
    return expert.kind, expert.role, sizes[expert.id]


def _rows(expert: Expert, layer_map: ExpertMap) -> frozenset[tuple[str, str | None]]:
    return frozenset(row for row in layer_map.rows if expert.serves(*row))


def _head(group: Sequence[Expert], layer_map: ExpertMap) -> str:
    if len(group) == 1:
        return group[0].id
    apart = _rows(group[0], layer_map) != _rows(group[1], layer_map)
    return f"{group[0].id} to {group[-1].id} ({len(group)}{', one each' if apart else ''})"


def _right(name: str, group: Sequence[Expert], modality: str, task: str | None) -> Cell:
    serving = [expert for expert in group if expert.serves(modality, task)]
    what = _list([expert.id for expert in serving])
    if not serving:
        return Cell(text="", align="c", title=f"not for {name}")
    if serving[0].role == "routed":
        return Cell(text="○", align="c", colour=level(0.1), title=f"the router may send tokens of {name} to {what}")
    return Cell(text="●", align="c", colour=level(0.35), title=f"every token of {name} passes through {what}")


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
        body=scale(_LEVELS, "0 %", "100 %")
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
        + scale(_SIDES, "a quarter of an even load or less", "four times as much or more")
        + flow(_load_table(names, steps, reports, layer) for layer in layers)
        + heading("Evenness of each modality")
        + scale(_LEVELS, "1, even", "0, as few experts as possible")
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
        body += paragraph(f"One modality only, so nothing to take away: {_list(single)}.")
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
    body = scale(_SIDES, "gains", "loses, as much as the task ever does") + table(
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


_SHARES = ("accuracy", "macro_f1", "auc", "map")


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


def _list(names: Sequence[str], most: int = 12) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
