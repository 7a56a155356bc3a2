"""Which rank of an expert-parallel group should hold which expert, by measured loads.

What is made even is the load of ranks in typical steps, not on average: each window of the record is a scenario, with
its own mix of modalities, and the mean over scenarios of the fullest rank's load is lowered: first the heaviest expert
where that costs least (LPT, Graham 1969), then swaps as long as one helps. Experts that are busy in the same
steps, because their modalities occur together, then stand on different ranks. Ranks hold equally many experts of each
width. W windows, L layers, U units (experts that stay together), R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moemm.config.experts import Expert
from moemm.errors import ConfigError
from moemm.plan.parameters import Layer, ModelShape, network
from moemm.plan.trace import Trace

if TYPE_CHECKING:
    from rich.table import Table

HELD_OUT = 3
"""One window of so many, the last ones, is kept to measure on."""


@dataclass(frozen=True, slots=True)
class Units:
    """Of one layer: ids of the experts of each unit, its width, and its load in each window, load_WU, in operations."""

    ids: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    load_WU: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlacement:
    """rank_U: of each unit; in_turn_U: as experts are dealt out without a placement.

    before, after: load of the fullest rank over the mean, in the windows that were held out; mean and worst of them.
    fitted: the same as `after`, where it was fitted.
    """

    layer: int
    units: Units
    rank_U: np.ndarray
    in_turn_U: np.ndarray
    before: tuple[float, float]
    after: tuple[float, float]
    fitted: float


def units_of(shape: ModelShape, layer: int, trace: Trace) -> Units:
    """The dispatched experts of a layer, lora experts with their bases, and the work that each had in each window."""
    own, dispatched = shape.layers[layer], shape.layers[layer].dispatched
    ids = {expert.id for expert in dispatched}
    groups: dict[str, list[Expert]] = {}
    for expert in dispatched:
        groups.setdefault(expert.base if expert.base in ids else expert.id, []).append(expert)
    loads = [sum(_load(shape, own, expert, layer, trace) for expert in group) for group in groups.values()]
    names = tuple(tuple(expert.id for expert in group) for group in groups.values())
    widths = tuple(sum(own.hidden(expert) for expert in group) for group in groups.values())
    return Units(names, widths, np.stack(loads, axis=1) if loads else np.zeros((len(trace), 0)))


def _load(shape: ModelShape, own: Layer, expert: Expert, layer: int, trace: Trace) -> Any:
    """(W,) operations of an expert in each window: rows x weights."""
    weights = sum(network(shape.model.dim, own.hidden(expert), shape.model.activation).values())
    if expert.role == "hard":
        served = np.array([expert.serves(*row) for row in shape.rows])
        return trace.tokens_WM[:, served].sum(1) * weights
    if layer not in trace.layers:
        return np.zeros(len(trace))
    column = trace.experts.index(expert.id)
    return trace.load_WLME[:, trace.layers.index(layer), :, column].sum(1) * weights


def place(shape: ModelShape, trace: Trace, ep: int) -> list[LayerPlacement]:
    """A placement for each layer that dispatches, fitted on the first windows and measured on the last ones.

    Raises ConfigError where a layer has fewer experts than the group has ranks, or there are too few windows.
    """
    fit, test = split(trace)
    if len(fit) < 2:
        raise ConfigError(
            f"a placement needs 3 windows of routing, and the record has {len(trace)}: train longer, or with a smaller "
            "train.log_every"
        )
    found = []
    for layer, own in enumerate(shape.layers):
        if own.dense is not None or not own.dispatched:
            continue
        units = units_of(shape, layer, fit)
        _check(units, layer, ep)
        fit_WU, test_WU = units.load_WU, units_of(shape, layer, test).load_WU
        in_turn_U = (np.arange(len(units.ids)) + layer) % ep
        rank_U = _improved(_greedy(fit_WU, units.widths, ep), fit_WU, units.widths, ep)
        found.append(
            LayerPlacement(
                layer=layer, units=units, rank_U=rank_U, in_turn_U=in_turn_U,
                before=unevenness(test_WU, in_turn_U, ep), after=unevenness(test_WU, rank_U, ep),
                fitted=unevenness(fit_WU, rank_U, ep)[0],
            )
        )  # fmt: skip
    if not found:
        raise ConfigError("the model has no modality or routed experts: there is nothing to place")
    return found


def split(trace: Trace) -> tuple[Trace, Trace]:
    """The windows that a placement is fitted on, and the last ones, on which it is measured."""
    held_out = max(len(trace) // HELD_OUT, 1)
    return trace.part(slice(None, -held_out)), trace.part(slice(-held_out, None))


def _check(units: Units, layer: int, ep: int) -> None:
    if len(units.ids) < ep or ep < 2:
        raise ConfigError(
            f"--ep {ep}: layer {layer} has {len(units.ids)} experts to place\n"
            f"  allowed: 2 to {len(units.ids)}, so that each rank has one"
        )


def unevenness(load_WU: np.ndarray, rank_U: np.ndarray, ep: int) -> tuple[float, float]:
    """Load of the fullest rank over the mean load: the mean over windows, and the worst of them."""
    load_WR = rank_loads(load_WU, rank_U, ep)
    ratio_W = load_WR.max(1) / np.maximum(load_WR.mean(1), 1e-9)
    return float(ratio_W.mean()), float(ratio_W.max())


def rank_loads(load_WU: np.ndarray, rank_U: np.ndarray, ep: int) -> np.ndarray:
    """(W, R) the load of each rank."""
    return load_WU @ np.eye(ep)[rank_U]


def _room(widths: Sequence[int], ep: int) -> dict[int, list[int]]:
    """Width -> how many units of it each rank takes: equally many, or one more."""
    room: dict[int, list[int]] = {}
    first = 0
    for width in sorted(set(widths), reverse=True):
        count = list(widths).count(width)
        extra = {(first + number) % ep for number in range(count % ep)}
        room[width] = [count // ep + (rank in extra) for rank in range(ep)]
        first += count % ep  # so that not always the first ranks have one more
    return room


def _greedy(load_WU: np.ndarray, widths: Sequence[int], ep: int) -> np.ndarray:
    """The heaviest unit first, each to the rank with room where the mean over windows of the fullest grows least."""
    load_WU = load_WU / np.maximum(load_WU.sum(1, keepdims=True), 1e-9)
    room, rank_U = _room(widths, ep), np.zeros(load_WU.shape[1], int)
    load_WR = np.zeros((len(load_WU), ep))
    for unit in np.argsort(-load_WU.mean(0), kind="stable").tolist():
        free = [rank for rank in range(ep) if room[widths[unit]][rank]]
        after = [load_WR[:, rank] + load_WU[:, unit] for rank in free]
        cost = [float(np.maximum(load_WR.max(1), one).mean() + 1e-6 * one.mean()) for one in after]
        chosen = free[int(np.argmin(cost))]
        rank_U[unit] = chosen
        room[widths[unit]][chosen] -= 1
        load_WR[:, chosen] += load_WU[:, unit]
    return rank_U


def _improved(rank_U: np.ndarray, load_WU: np.ndarray, widths: Sequence[int], ep: int) -> np.ndarray:
    """Swaps of two units of one width on different ranks, the best one at a time, until none helps."""
    load_WU = load_WU / np.maximum(load_WU.sum(1, keepdims=True), 1e-9)
    rank_U, width_U = rank_U.copy(), np.array(widths)
    best = float(rank_loads(load_WU, rank_U, ep).max(1).mean())
    while True:
        cost, pair = _best(rank_U, load_WU, width_U, ep)
        if pair is None or cost > best - 1e-9:
            return rank_U
        rank_U[list(pair)] = rank_U[list(pair[::-1])]
        best = cost


def _best(
    rank_U: np.ndarray, load_WU: np.ndarray, width_U: np.ndarray, ep: int
) -> tuple[float, tuple[int, int] | None]:
    """The swap after which the mean of the fullest is least, and that mean."""
    load_WR = rank_loads(load_WU, rank_U, ep)
    found: tuple[float, tuple[int, int] | None] = (np.inf, None)
    for unit in range(len(rank_U)):
        others = np.flatnonzero((rank_U != rank_U[unit]) & (width_U == width_U[unit]) & (np.arange(len(rank_U)) > unit))
        if not len(others):
            continue
        move_WO = load_WU[:, others] - load_WU[:, [unit]]
        after_WOR = np.repeat(load_WR[:, None], len(others), axis=1)
        after_WOR[:, :, rank_U[unit]] += move_WO
        after_WOR[:, np.arange(len(others)), rank_U[others]] -= move_WO
        cost_O = after_WOR.max(2).mean(0)
        least = int(cost_O.argmin())
        if cost_O[least] < found[0]:
            found = float(cost_O[least]), (unit, int(others[least]))
    return found


def as_yaml(shape: ModelShape, found: Sequence[LayerPlacement], ep: int) -> str:
    """The section to paste, or to name in `base:`: expert id -> position among the ep ranks, one for each layer."""
    positions: dict[str, list[int]] = {}
    for one in found:
        for ids, rank in zip(one.units.ids, one.rank_U.tolist(), strict=True):
            for name in ids:
                positions.setdefault(name, [0] * len(shape.layers))[one.layer] = rank
    lines = [f"    {name}: {ranks if len(set(ranks)) > 1 else ranks[:1]}" for name, ranks in positions.items()]
    return "\n".join(["deepspeed:", f"  ep_size: {ep}", "  placement:", *lines]) + "\n"


def to_dict(found: Sequence[LayerPlacement], ep: int) -> dict[str, Any]:
    """Figures and positions as JSON types."""
    layers = [
        {
            "layer": one.layer,
            "positions": {n: r for ids, r in zip(one.units.ids, one.rank_U.tolist(), strict=True) for n in ids},
            "in_turn": {"mean": one.before[0], "worst": one.before[1]},
            "placed": {"mean": one.after[0], "worst": one.after[1], "fitted": one.fitted},
        }
        for one in found
    ]
    before, after = (float(np.mean([getattr(one, key)[0] for one in found])) for key in ("before", "after"))
    gain = 1 - (after - 1) / max(before - 1, 1e-9)
    return {"ep_size": ep, "in_turn": before, "placed": after, "gain": gain, "layers": layers}


def positions_of(found: Sequence[LayerPlacement]) -> Mapping[int, np.ndarray]:
    """Layer -> rank of each unit."""
    return {one.layer: one.rank_U for one in found}


def render(values: Mapping[str, Any]) -> Table:
    """How even the ranks are, layer by layer."""
    from rich.table import Table

    title = (
        f"load of the fullest of {values['ep_size']} ranks over the mean, in windows that the placement has not seen"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("layer")
    for column in ("in turn", "worst", "placed", "worst", "where it was fitted"):
        table.add_column(column, justify="right")
    for one in values["layers"]:
        turn, placed = one["in_turn"], one["placed"]
        numbers = (turn["mean"], turn["worst"], placed["mean"], placed["worst"], placed["fitted"])
        table.add_row(str(one["layer"]), *(f"{number:.3f}" for number in numbers))
    table.add_row("all", f"{values['in_turn']:.3f}", "", f"{values['placed']:.3f}", "", "")
    return table
