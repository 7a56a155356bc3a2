"""The answer of `moemm analyze conflict` as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

PAIRS, PLACES, STEPS, WIDE = 12, 10, 6, 9
"""Most lines of both tables; most steps shown; most columns before those of a layer become one."""
SUMS = ("layer", "experts")
Entry = Mapping[str, Any]


def render_conflict(values: Mapping[str, Any]) -> Group:
    """Pairs by place at the newest checkpoint, the worst places over time, and what is to be done."""
    steps = f"step{'s' if len(values['steps']) > 1 else ''} {', '.join(map(str, values['steps']))}"
    drawn = f"{values['batches']} batches of {values['samples']} samples"
    parts: list[Any] = [f"run         {values['run']}"]
    parts.append(f"gradients   of {len(values['losses'])} losses, {drawn}, at {steps}")
    parts += [f"left out    {line}" for line in values["skipped"]]
    parts += [*_pairs(values), *_places(values), *_verdict(values)]
    return Group(*parts)


def upper(entry: Entry) -> float:
    """What the newest mean cosine surely lies under: by this the worst come first."""
    cos, error = entry["cos"][-1], entry["error"][-1]
    return 9.0 if cos is None else float(cos + 2 * (error if error is not None else 1.0))


def pair_of(entry: Entry) -> str:
    """`a | b`."""
    return " | ".join(entry["losses"])


def _pairs(values: Mapping[str, Any]) -> Iterator[Any]:
    lasting = {(title, pair_of(one)) for one in values["lasting"] for title in _within(one)}
    columns = _columns(values["parts"])
    cells: dict[str, dict[str, Entry]] = {}
    for entry in values["parts"]:
        if entry["title"] in columns:
            cells.setdefault(pair_of(entry), {})[entry["title"]] = entry
    order = sorted(cells, key=lambda pair: min(map(upper, cells[pair].values())))
    more = f", the worst {PAIRS} of {len(order)} pairs" if len(order) > PAIRS else ""
    yield (
        f"\nMean cosine by layer and part, step {values['steps'][-1]}{more}. Under 0 they pull apart; * lastingly, "
        "there or in one of the experts."
    )
    table = Table(padding=(0, 1))
    table.add_column("losses", overflow="fold")
    for name in columns.values():
        table.add_column(name, justify="right")
    for pair in order[:PAIRS]:
        row = [cells[pair].get(title) for title in columns]
        table.add_row(pair, *("" if one is None else _cell(one, (one["title"], pair) in lasting) for one in row))
    yield table


def _columns(entries: Sequence[Entry]) -> dict[str, str]:
    """Title of a part -> head of its column: attention, experts and router of each layer, or each layer as one."""
    fine = ("attention", "experts", "router", "pool")
    found = {entry["title"]: entry["title"] for entry in entries if entry["kind"] in fine}
    if len(found) > WIDE:
        found = {entry["title"]: entry["title"] for entry in entries if entry["kind"] in ("layer", "pool")}
    return found


def _cell(entry: Entry, lasts: bool) -> str:
    cos = entry["cos"][-1]
    return "" if cos is None else f"{cos:+.2f}{'*' if lasts else ' '}"


def _places(values: Mapping[str, Any]) -> Iterator[Any]:
    under = [entry for entry in values["parts"] if entry["kind"] not in SUMS and (entry["cos"][-1] or 0.0) < 0]
    entries = sorted(under, key=upper)
    if not entries:
        return
    lasting = {(one["title"], pair_of(one)): one for one in values["lasting"]}
    steps = values["steps"][-STEPS:]
    yield (
        "\nThe worst places one by one: mean cosine and its error; batches under 0; how much of the cosine is between "
        "modalities; the mean at the step of each checkpoint; in how many of the last checkpoints it is surely under 0."
    )
    table = Table(padding=(0, 0, 0, 1))
    table.add_column("layer and part", overflow="fold")
    table.add_column("losses", overflow="fold")
    for name in ("cosine", "under 0", "between", *map(str, steps), "lasts"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in entries[:PLACES]:
        found = lasting.get((entry["title"], pair_of(entry)))
        lasts = "" if found is None else f"{found['clear']} of {found['of']}"
        over = ("" if cos is None else f"{cos:+.2f}" for cos in entry["cos"][-STEPS:])
        table.add_row(_place(entry), pair_of(entry), *_newest(entry), *over, lasts)
    yield table


def _within(entry: Entry) -> list[str]:
    """Titles of a part and of the sums that it is in."""
    layer = [f"layer {entry['layer']}"] if entry["layer"] is not None else []
    experts = [f"{entry['layer']} experts"] if entry["kind"] in ("expert", "group", "ffn") else []
    return [entry["title"], *layer, *experts]


def _place(entry: Entry) -> str:
    if entry["kind"] not in ("expert", "group"):
        return str(entry["title"])
    return f"{entry['layer']} {entry['name']}{' (all)' if entry['kind'] == 'group' else ''}"


def _newest(entry: Entry) -> tuple[str, str, str]:
    cos, error, same, opposed = (entry[key][-1] for key in ("cos", "error", "same", "opposed"))
    if cos is None:
        return "", "", ""
    between = "" if same is None else f"{cos - same:+.3f}"
    return f"{cos:+.3f} ± {error:.3f}" if error is not None else f"{cos:+.3f}", f"{opposed:.0%}", between


def _verdict(values: Mapping[str, Any]) -> Iterator[str]:
    lasting, steps = values["lasting"], values["steps"]
    if not lasting:
        yield "\nno lasting conflict: nowhere is the mean cosine surely under 0, so no configuration is written"
    yield from _remedies(values["remedies"])
    if lasting and not any(one["remedy"] for one in values["remedies"]):
        yield "\nexperts of their own help none of these, so no configuration is written"
    if values["refused"]:
        yield f"\nthe split does not fit this run's map or router, so no configuration is written: {values['refused']}"
    if len(steps) == 1:
        yield (
            f"\nthe run keeps one checkpoint, step {steps[0]}: whether a conflict lasts is not known. To keep more: "
            "--train.checkpoint.every 100 --train.checkpoint.keep 6"
        )
    if values["parameters"]:
        before, after = (f"{values['parameters'][key]:,}" for key in ("before", "after"))
        yield f"\nparameters  {before} before, {after} split"


def _remedies(remedies: Sequence[Entry]) -> Iterator[str]:
    """What helps, with the places and losses for which it does."""
    words = {"modality": "Experts by modality", "task": "Experts by task", None: "No split"}
    found: dict[str, list[str]] = {}
    for one in remedies:
        found.setdefault(f"{words[one['remedy']]}: {one['why']}", []).append(f"{one['title']} ({pair_of(one)})")
    for what, places in found.items():
        more = f" and {len(places) - PLACES} more" if len(places) > PLACES else ""
        yield f"\n{what}\n  {', '.join(places[:PLACES])}{more}"
