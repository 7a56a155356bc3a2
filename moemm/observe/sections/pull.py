"""Where losses pull parameters apart, from what `moemm analyze conflict` left in the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moemm.observe.colour import SIDE_STEPS, side
from moemm.observe.page import Cell, Section, flow, heading, paragraph, scale, table

SHOWN = 20
"""Pairs that get a line in the tables over time: the worst."""
COLUMNS = 8
"""Pairs that get a column in the tables of experts."""
FULL = 0.2
"""Cosine whose colour is as strong as it gets: those of parameters are small."""
Entry = Mapping[str, Any]
_KINDS = ("attention", "experts", "router")


def pull_section(values: Mapping[str, Any]) -> Section:
    """A heat map, loss by loss, of each layer at the newest checkpoint; then each layer and modality over time."""
    layers = sorted({entry["layer"] for entry in values["parts"] if entry["layer"] is not None})
    maps = [_matrix(values, layer) for layer in layers]
    steps = [f"step {step}" for step in values["steps"]]
    over = [_over_time(values["parts"], layer, kind, steps) for layer in layers for kind in _KINDS]
    own = [entry for entry in values["modalities"] if entry["kind"] == "experts"]
    by = [_modalities([entry for entry in own if entry["layer"] == layer], layer, steps) for layer in layers]
    return Section(
        key="pull",
        title="Where losses pull parameters apart",
        lead=f"Mean cosine of the gradients of two losses over {values['batches']} batches of {values['samples']} "
        "samples, on the parameters that both reach, from moemm analyze conflict. Blue: they pull apart. Brown: "
        "they pull together. Near 0: they have nothing to do with each other. Over time, the pairs that pull apart "
        "most come first.",
        body=scale(SIDE_STEPS, f"-{FULL} or less", f"+{FULL} or more")
        + heading(f"Each layer as a whole, step {values['steps'][-1]}")
        + flow(maps)
        + heading("Over time")
        + flow(part for part in over if part)
        + heading(f"Experts one by one, step {values['steps'][-1]}")
        + flow(filter(None, (_experts(values["parts"], layer) for layer in layers)))
        + (heading("Experts, by what the tokens of one modality bring") + flow(filter(None, by)) if own else "")
        + _remedies(values),
    )


def _matrix(values: Mapping[str, Any], layer: int) -> str:
    losses = values["losses"]
    known = {
        tuple(entry["losses"]): entry
        for entry in values["parts"]
        if entry["kind"] == "layer" and entry["layer"] == layer
    }
    rows = []
    for a in losses:
        entries = [known.get((a, b), known.get((b, a))) for b in losses]
        rows.append((a, [_cell(entry, -1) if a != b else _blank() for entry, b in zip(entries, losses, strict=True)]))
    title = f"Layer {layer}"
    return heading(title) + table(["losses", *losses], rows, label=f"Cosines, {title}")


def _over_time(entries: Sequence[Entry], layer: int, kind: str, steps: Sequence[str]) -> str:
    own = [entry for entry in entries if entry["layer"] == layer and entry["kind"] == kind]
    if not own:
        return ""
    rows = [(" | ".join(one["losses"]), _row(one)) for one in sorted(own, key=_newest)[:SHOWN]]
    title = f"Layer {layer}, {kind}"
    return heading(title) + table(["losses", *steps], rows, label=f"Over time, {title}")


def _experts(entries: Sequence[Entry], layer: int) -> str:
    """Expert x pair; the pairs that pull most apart first."""
    own = [entry for entry in entries if entry["layer"] == layer and entry["kind"] == "expert"]
    if not own:
        return ""
    pairs = list(dict.fromkeys(tuple(entry["losses"]) for entry in sorted(own, key=_newest)))[:COLUMNS]
    known = {(entry["name"], tuple(entry["losses"])): entry for entry in own}
    names = list(dict.fromkeys(entry["name"] for entry in own))
    rows = [(name, [_cell(known.get((name, pair)), -1) for pair in pairs]) for name in names]
    title = f"Layer {layer}"
    return heading(title) + table(["expert", *map(" | ".join, pairs)], rows, label=f"Experts, {title}")


def _modalities(entries: Sequence[Entry], layer: int, steps: Sequence[str]) -> str:
    if not entries:
        return ""
    rows = [(f"{one['modality']}: {' | '.join(one['losses'])}", _row(one)) for one in sorted(entries, key=_newest)]
    title = f"Layer {layer}"
    return heading(title) + table(["modality", *steps], rows[:SHOWN], label=f"By modality, {title}")


def _row(entry: Entry) -> list[Cell]:
    return [_cell(entry, number) for number in range(len(entry["cos"]))]


def _newest(entry: Entry) -> float:
    return 9.0 if entry["cos"][-1] is None else float(entry["cos"][-1])


def _cell(entry: Entry | None, number: int) -> Cell:
    cos = None if entry is None else entry["cos"][number]
    if entry is None or cos is None:
        return _blank()
    error = entry["error"][number]
    more = "" if error is None else f" ± {error:.3f}"
    title = f"{cos:+.3f}{more}; under 0 in {entry['opposed'][number]:.0%} of {entry['batches'][number]} batches"
    return Cell(text=f"{cos:+.2f}", colour=side(cos / FULL), align="c", title=title)


def _blank() -> Cell:
    return Cell(text="·", align="c", faint=True, title="they do not meet here")


def _remedies(values: Mapping[str, Any]) -> str:
    if not values["lasting"]:
        return paragraph("No conflict lasts: nowhere is the mean cosine surely under 0.")
    words = {"modality": "experts by modality", "task": "experts by task", None: "no split"}
    rows = [
        (one["title"], [Cell(text=" | ".join(one["losses"]), align="l"), Cell(text=words[one["remedy"]], align="l"),
                        Cell(text=one["why"], align="l")])
        for one in values["remedies"]
    ]  # fmt: skip
    head = ["layer and part", "losses", "what helps", "why"]
    return heading("Conflicts that last") + table(head, rows, label="Conflicts that last")
