"""Which hidden units of a dense network each expert of a layer gets, so that every token still passes through all.

A row is a modality, or a modality in a task (see moe/expert_map.py). What a token passes through: the shared experts,
the hard ones of its row, and G shards of the routed ones. Units are dealt to the three in proportion to their widths;
an expert with room for more keeps drawn units with nothing behind them (w2 = 0), which change no output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from moemm.config.schema import RouterConfig
from moemm.errors import ConfigError
from moemm.moe import Expert, ExpertMap, active_experts

Row = tuple[str, str | None]
Gates = Literal["raw", "renormalised", "straight_through"]
ALL = "hard"
"""The router kind that uses every expert that a token may use."""


@dataclass(frozen=True, slots=True)
class Portion:
    """The units first <= u < last of a dense network, their w2 times `scale`."""

    first: int
    last: int
    scale: float = 1.0

    @property
    def count(self) -> int:
        """Number of units."""
        return self.last - self.first


@dataclass(frozen=True, slots=True, kw_only=True)
class Routes:
    """How the routed experts hold the units: in shards, as copies of them.

    shards: G; a token's top-k experts are k / G whole groups of G shards. scale: of w2, against the sum of the gates
    that reach one shard. gates: what `router.gates` has to be. uses: k, where just as many are always used. even: every
    expert counts 1 / their number.
    """

    shards: int
    scale: float
    gates: Gates
    uses: int = 1
    even: bool = False


@dataclass(slots=True)
class Dealt:
    """portions: expert id -> what it holds. twins: groups of routed experts whose router rows are to be equal."""

    portions: dict[str, Portion] = field(default_factory=dict)
    twins: list[list[str]] = field(default_factory=list)


def routes_of(router: RouterConfig, shards: int) -> Routes:
    """What has to be for a router to give each shard a sum of gates that is known, and itself a gradient.

    Raises ConfigError where this kind of router cannot use so many shards.
    """
    if router.kind == ALL:
        return Routes(shards=1, scale=1.0, gates=router.gates, even=True)
    top_k = active_experts(router)
    if router.kind in ("expert_choice", "top_p"):
        if shards > 1:
            raise ConfigError(
                f"model.router.kind {router.kind} takes experts one by one, and would cut a group of {shards} shards; "
                "give --granularity 1, or another kind"
            )
        # All probabilities add up to 1, as do those that are kept and renormalised.
        return Routes(shards=1, scale=1.0, gates="renormalised" if router.kind == "top_p" else router.gates)
    assert top_k is not None
    if top_k % shards:
        raise ConfigError(
            f"--granularity {shards} does not divide model.router.top_k, which is {top_k}: a token uses whole groups "
            f"of shards; allowed: {', '.join(str(n) for n in divisors(top_k))}"
        )
    if router.gates == "renormalised" and shards > 1:
        return Routes(shards=shards, scale=float(shards), gates="renormalised", uses=top_k)
    # Probabilities differ by token, and renormalised ones of equal copies give the router no gradient; these are 1.
    return Routes(shards=shards, scale=shards / top_k, gates="straight_through", uses=top_k)


def divisors(number: int) -> list[int]:
    """Those of a positive number, ascending."""
    return [one for one in range(1, number + 1) if number % one == 0]


def deal(layer_map: ExpertMap, units: int, routes: Routes, *, layer: int = 0) -> Dealt:
    """Deal `units` hidden units to the experts of one layer.

    Raises ConfigError where some row passes through fewer units than there are, where routed experts cannot be put into
    groups of G, or where the map has lora experts.
    """
    _refuse_lora(layer_map)
    shared = layer_map.of_role("shared")
    room = sum(expert.width for expert in shared)
    parts = [_Part.of(layer_map, rows, routes) for rows in _components(layer_map)]
    least = min(parts, key=lambda part: part.room)
    if room + least.room < units:
        who = " in task ".join(name for name in least.rows[0] if name)
        raise ConfigError(
            f"layer {layer}: the dense network has {units} hidden units, but a token of {who} passes through only "
            f"{room + least.room}: {room} shared, {least.hard} by modality, {least.routed} routed\n"
            "  to do: widen the experts, or let a token use more of them (model.router.top_k; --granularity)"
        )
    common = math.ceil(units * room / (room + least.room))
    dealt = Dealt(_spread([(e.id, e.width) for e in shared], room, Portion(0, common)))
    for part in parts:
        part.deal(Portion(common, units), routes, dealt)
    return dealt


@dataclass(slots=True)
class _Part:
    """Rows that share experts with each other and with no other row, and what a token of any of them passes through."""

    rows: list[Row]
    hard: int
    routed: int
    places: dict[str, tuple[int, int]]
    groups: list[list[Expert]]
    scales: dict[str, float]

    @classmethod
    def of(cls, layer_map: ExpertMap, rows: list[Row], routes: Routes) -> _Part:
        mine = [e for e in layer_map.experts if any(e.serves(*row) for row in rows)]
        hard = [e for e in mine if e.role == "hard"]
        routed = [e for e in mine if e.role == "routed"]
        places, hard_room = _tiles(hard, rows)
        if routes.even:
            even_places, room = _tiles([e for e in routed if e.width], rows)
            return cls(rows, hard_room, room, {**places, **even_places}, [], _even_scales(routed, rows))
        groups = _groups([e for e in routed if e.width], rows, routes.shards)
        _check_slots(routed, rows, routes.uses)
        served = all(any(group[0].serves(*row) for group in groups) for row in rows)
        room = routes.shards * min((e.width for group in groups for e in group), default=0) if served else 0
        return cls(rows, hard_room, room, places, groups, {})

    @property
    def room(self) -> int:
        return self.hard + self.routed

    def deal(self, units: Portion, routes: Routes, dealt: Dealt) -> None:
        """Hard experts first; the routed ones hold what is left."""
        number = math.ceil(units.count * self.hard / self.room) if self.room else 0
        middle = units.first + number
        own, rest = Portion(units.first, middle), Portion(middle, units.last)
        for name, (first, last) in self.places.items():
            even = name in self.scales
            room, portion = (self.routed, rest) if even else (self.hard, own)
            scale = self.scales.get(name, 1.0)
            dealt.portions[name] = _cut(portion, first, last, room, scale)
        for group in self.groups:
            for place, expert in enumerate(group):
                dealt.portions[expert.id] = _cut(rest, place, place + 1, routes.shards, routes.scale)
            if routes.shards > 1:
                dealt.twins.append([expert.id for expert in group])


def _cut(units: Portion, first: int, last: int, room: int, scale: float) -> Portion:
    """The share of `units` that the range first to last has of `room`; nothing behind its end."""
    if not room:
        return Portion(units.first, units.first, scale)
    begin, end = (units.first + units.count * min(place, room) // room for place in (first, last))
    return Portion(begin, end, scale)


def _spread(widths: Sequence[tuple[str, int]], room: int, units: Portion) -> dict[str, Portion]:
    """One after the other, in proportion to their widths."""
    found, place = {}, 0
    for name, width in widths:
        found[name] = _cut(units, place, place + width, room, 1.0)
        place += width
    return found


def _components(layer_map: ExpertMap) -> list[list[Row]]:
    """Rows, those that some hard or routed expert serves together in one list."""
    own = [expert for expert in layer_map.experts if expert.role != "shared" and expert.width]
    groups: list[list[Row]] = [[row] for row in layer_map.rows]
    for expert in own:
        served = [group for group in groups if any(expert.serves(*row) for row in group)]
        if len(served) > 1:
            groups = [group for group in groups if group not in served] + [[row for one in served for row in one]]
    order = {row: place for place, row in enumerate(layer_map.rows)}
    return sorted((sorted(group, key=order.__getitem__) for group in groups), key=lambda group: order[group[0]])


def _tiles(experts: Sequence[Expert], rows: Sequence[Row]) -> tuple[dict[str, tuple[int, int]], int]:
    """Places of experts behind each other such that each has one place in all of its rows, and the least end of a row.

    Where there is no such order, they have no room: what one row's experts hold would be missing in another.
    """
    ends = dict.fromkeys(rows, 0)
    places: dict[str, tuple[int, int]] = {}
    for expert in sorted(experts, key=lambda e: -sum(e.serves(*row) for row in rows)):
        served = [row for row in rows if expert.serves(*row)]
        starts = {ends[row] for row in served}
        if len(starts) > 1:
            return {one.id: (0, 0) for one in experts}, 0
        start = starts.pop()
        places[expert.id] = (start, start + expert.width)
        ends |= dict.fromkeys(served, start + expert.width)
    return places, min(ends.values())


def _groups(routed: Sequence[Expert], rows: Sequence[Row], shards: int) -> list[list[Expert]]:
    """Groups of G experts that serve the same rows, by id; in a tie the lower ids come first, so whole groups do."""
    alike: dict[tuple[bool, ...], list[Expert]] = {}
    for expert in routed:
        alike.setdefault(tuple(expert.serves(*row) for row in rows), []).append(expert)
    for members in alike.values():
        if len(members) % shards:
            raise ConfigError(
                f"--granularity {shards} does not divide the {len(members)} routed experts {members[0].id} to "
                f"{members[-1].id}, which serve the same tokens; change `count` of their group"
            )
    return [members[at : at + shards] for members in alike.values() for at in range(0, len(members), shards)]


def _check_slots(routed: Sequence[Expert], rows: Sequence[Row], uses: int) -> None:
    """Refuse zero experts without which a token's slots cannot be filled: what they take would be missing."""
    for row in rows:
        known = [expert for expert in routed if expert.serves(*row)]
        real = sum(bool(expert.width) for expert in known)
        if real < min(uses, len(known)):
            raise ConfigError(
                f"model.router.top_k is {uses}, but only {real} of the routed experts that serve {row[0]} compute "
                "something; the zero experts would take a part of the dense network away from every token"
            )


def _even_scales(routed: Sequence[Expert], rows: Sequence[Row]) -> dict[str, float]:
    """The number of experts that count evenly in the rows of each."""
    numbers: Mapping[Row, int] = {row: sum(e.serves(*row) for e in routed) for row in rows}
    found = {}
    for expert in (e for e in routed if e.width):
        own = {numbers[row] for row in rows if expert.serves(*row)}
        if len(own) > 1:
            counts = ", ".join(f"{row[0]} {numbers[row]}" for row in rows if expert.serves(*row))
            raise ConfigError(
                f"model.router.kind hard averages other numbers of experts for the tokens that {expert.id} serves "
                f"({counts}), so that no copy keeps what the dense network computes; give them equally many"
            )
        found[expert.id] = float(own.pop())
    return found


def _refuse_lora(layer_map: ExpertMap) -> None:
    for expert in layer_map.experts:
        if expert.kind == "lora":
            raise ConfigError(
                f"model.experts.groups: {expert.id} is a lora expert, which computes what its base does once more; "
                "leave the group out, and add it when training has made the base"
            )
