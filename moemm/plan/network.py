"""What collectives carry in a step, counted as moemm.testing.traffic counts, and how long that takes on the links.

The engine's are those of DeepSpeed 0.19.8: ZeRO-0 joins all gradients in one all-reduce; 1 and 2 all-reduce buckets
(each rank keeps its part) and gather the new weights, 2 reduces in each micro-batch; 3 gathers weights of more than
PERSISTENT elements in each micro-batch (again for the backward pass where the model has more than it keeps), smaller
ones once a step, and reduce-scatters gradients in each micro-batch.
Expert parallelism sends a token once to each rank that has an expert of its, with its gates, and gets a row of D back;
backward the same (moe/dispatcher.py). What goes to the own rank is counted, and takes no time. Times: rings inside a
node over `link`, between nodes over `network`, at LINK_SHARE of their rates; nothing is taken to be hidden behind
computing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moemm.plan.devices import Device
from moemm.plan.flops import most_slots
from moemm.plan.layout import PERSISTENT, Layout
from moemm.plan.memory import LIVE, remote_rows
from moemm.plan.parameters import Layer, ModelShape, expert_parameters, parameters, trained
from moemm.plan.workload import Workload

AGREED, AGREED_SPREAD = 80, 144
"""Bytes of a micro-batch by which ranks agree, marks and flags of the guard and its check; where experts are spread."""
LINK_SHARE = 0.8
"""Of the makers' rates that large messages reach."""
_VECTORS = re.compile(
    r"bias|^modality_D\.|norm|router\.(rows|noise)\.|^missing\.(rows\.|mark_D)|pair_loss\.|log_variance|embedding"
)
"""Parameters that get no weight decay: of one axis, or tables. See train/engine.py, parameter_groups."""


@dataclass(frozen=True, slots=True)
class Collective:
    """what: for whom. payload: bytes a step, all calls together. ranks: of the group. seconds: of a step."""

    kind: str
    what: str
    payload: int
    ranks: int
    seconds: float


def collectives(shape: ModelShape, work: Workload, layout: Layout, device: Device) -> list[Collective]:
    """All of a step on one rank, the engine's first; none on one rank."""
    if layout.ranks == 1:
        return []
    sizes = trained(shape, parameters(shape))
    experts = expert_parameters(shape, sizes) if layout.ep > 1 else {}
    dense = {name: size for name, size in sizes.items() if name not in experts}
    found = [*_engine(dense, "weights outside experts" if experts else "weights", layout.ranks, layout, device)]
    if experts and layout.expert_ranks > 1:
        local = {name: math.ceil(size / layout.ep) for name, size in experts.items()}
        found += _engine(local, "experts", layout.expert_ranks, layout, device)
    found.append(_all_to_all(shape, work, layout, device))
    found += _control(shape, layout, device)
    return [one for one in found if one.payload]


def _engine(sizes: Mapping[str, int], what: str, ranks: int, layout: Layout, device: Device) -> Iterable[Collective]:
    """Gradients and weights of some parameters in a group of ranks."""
    total = sum(sizes.values()) * layout.bytes

    def one(kind: str, subject: str, payload: int) -> Collective:
        return Collective(kind, f"{subject} of {what}", payload, ranks, seconds(kind, payload, ranks, device))

    if layout.stage == 3:
        small = {name: size for name, size in sizes.items() if size <= PERSISTENT}
        large = {name: size for name, size in sizes.items() if size > PERSISTENT}
        passes = layout.accumulation * (1 if layout.held <= LIVE else 2)
        gathered = (_padded(small, ranks) + passes * _padded(large, ranks)) * layout.bytes
        yield one("reduce_scatter", "gradients", layout.accumulation * _padded(sizes, ranks) * layout.bytes)
        yield one("all_gather", "weights", gathered)
        return
    yield one("all_reduce", "gradients", total * (layout.accumulation if layout.stage == 2 else 1))
    if layout.stage:
        yield one("all_gather", "weights", _flat(sizes, ranks) * layout.bytes)


def _padded(sizes: Mapping[str, int], ranks: int) -> int:
    """Elements where each parameter is dealt out in equal parts."""
    return sum(-(-size // ranks) * ranks for size in sizes.values())


def _flat(sizes: Mapping[str, int], ranks: int) -> int:
    """Elements of the two flat groups, with weight decay and without, each dealt out in parts of an even length."""
    vectors = sum(size for name, size in sizes.items() if is_vector(name))
    groups = (sum(sizes.values()) - vectors, vectors)
    return sum(-(-group // (2 * ranks)) * 2 * ranks for group in groups)


def is_vector(name: str) -> bool:
    """Whether a parameter, by its name, gets no weight decay."""
    return _VECTORS.search(name) is not None


def all_to_all_bytes(shape: ModelShape, work: Workload, layout: Layout) -> float:
    """Bytes that a rank hands in in a step: there a row of D and 2 K fp32 numbers (gates and experts) for each token
    and rank that it needs, back a row of D; backward the same; numbers of rows, 8 bytes a rank and forward pass.
    """
    tokens = work.total * layout.micro_batch * layout.accumulation
    total = 0.0
    for layer in shape.layers:
        # Remote ranks, and this one with the same chance as each of them.
        rows = remote_rows(shape, layer, work, layout.ep) * layout.ep / (layout.ep - 1) if layout.ep > 1 else 0.0
        if rows:
            total += bytes_of_rows(shape, layer, rows * tokens, layout)
    return total


def bytes_of_rows(shape: ModelShape, layer: Layer, rows: float, layout: Layout) -> float:
    """Those of one layer in a step whose forward passes send and get `rows` tokens (once, where they run twice)."""
    again = 2 if shape.config.train.activation_checkpointing else 1
    row = 2.0 * shape.model.dim * layout.bytes + 8.0 * most_slots(shape, layer)
    return (again + 1) * rows * row + again * layout.accumulation * 8.0 * layout.ep


def _all_to_all(shape: ModelShape, work: Workload, layout: Layout, device: Device) -> Collective:
    payload = round(all_to_all_bytes(shape, work, layout))
    calls = 7 * layout.accumulation * len(shape.layers)
    crossing = payload * (layout.ep - 1) / layout.ep
    time = seconds("all_to_all", crossing, layout.ep, device, calls=calls) if payload else 0.0
    return Collective("all_to_all", "tokens of experts", payload, layout.ep, time)


def _control(shape: ModelShape, layout: Layout, device: Device) -> Iterable[Collective]:
    """Sums of the routers, in float64: (3 L M E + 4 L M + M); what the guard compares; the norm of the gradient."""
    layers = [layer for layer in shape.layers if layer.dense is None and layer.role("routed")]
    if layers:
        rows, experts = len(shape.rows), len({e.id for layer in layers for e in layer.role("routed")})
        sums = 8 * (len(layers) * rows * (3 * experts + 4) + rows) * layout.accumulation
        yield Collective(
            "all_reduce",
            "statistics of routers",
            sums,
            layout.ranks,
            seconds("all_reduce", sums, layout.ranks, device, calls=layout.accumulation),
        )
    norm = {0: 4, 1: 8, 2: 8, 3: 16}[layout.stage] + (layout.bytes == 2 and layout.stage in (1, 2))
    if layout.ep > 1:
        norm += 8 if layout.stage == 3 else 4
    guard = (AGREED if layout.ep == 1 else AGREED_SPREAD) * layout.accumulation + norm
    calls = 2 * layout.accumulation + 2
    yield Collective(
        "all_reduce",
        "agreement of ranks",
        guard,
        layout.ranks,
        seconds("all_reduce", guard, layout.ranks, device, calls=calls),
    )


def seconds(kind: str, payload: float, ranks: int, device: Device, *, calls: int = 1) -> float:
    """Time of collectives that carry `payload` bytes together, in `calls` calls."""
    if ranks == 1 or not payload:
        return 0.0
    inside = min(ranks, device.node)
    nodes = -(-ranks // device.node)
    link, network = device.link * LINK_SHARE, device.network * LINK_SHARE
    if kind == "all_to_all":
        remote = (ranks - inside) / (ranks - 1)
        moved = payload * (1 - remote) / link + payload * remote / network
    else:
        passes = 2 if kind == "all_reduce" else 1
        moved = passes * (inside - 1) / inside * payload / link
        moved += passes * (nodes - 1) / nodes * payload / inside / network
    return moved + calls * device.latency * math.log2(ranks)
