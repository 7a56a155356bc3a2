"""Who may use which expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moemm.models import Model
from moemm.moe import Expert, ExpertMap
from moemm.observe.colour import level
from moemm.observe.expert_layers import ExpertLayers, expert_layers, layers_title
from moemm.observe.page import Cell, Section, heading, paragraph, table
from moemm.observe.routing import row_name
from moemm.observe.table import listing


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
    what = listing([expert.id for expert in serving])
    if not serving:
        return Cell(text="", align="c", title=f"not for {name}")
    if serving[0].role == "routed":
        return Cell(text="○", align="c", colour=level(0.1), title=f"the router may send tokens of {name} to {what}")
    return Cell(text="●", align="c", colour=level(0.35), title=f"every token of {name} passes through {what}")
