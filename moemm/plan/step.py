"""One layout of a run: its memory, operations, network and time a step, hours and energy. And what to be warned of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moemm.plan import flops
from moemm.plan.devices import Device
from moemm.plan.layout import Layout
from moemm.plan.memory import Memory, memory
from moemm.plan.network import Collective, collectives
from moemm.plan.parameters import ModelShape
from moemm.plan.workload import Workload

KERNELS_A_BLOCK, KERNELS_A_PART = 200, 40
"""Assumed, of the order of a profile of the CPU's operators: of a block, and of a tokenizer or head."""
FEW_ROWS = 64
"""Rows of an expert in a micro-batch under which its products are too small to fill a device."""
UNEVEN = 1.25
"""Load of the fullest over the mean load that is worth a warning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A layout with all that follows. computing: seconds of a step without the network. fits: into the memory."""

    layout: Layout
    memory: Memory
    operations: float
    computing: float
    collectives: tuple[Collective, ...]
    fits: bool

    @property
    def network(self) -> float:
        """Seconds of a step that collectives take."""
        return sum(one.seconds for one in self.collectives)

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.computing + self.network


def make_plan(shape: ModelShape, work: Workload, layout: Layout, device: Device) -> Plan:
    """What a layout comes to on a device."""
    held = memory(shape, work, layout, device)
    operations = flops.training(shape, work) * layout.batch
    rate = device.flops(shape.config.train.precision) * device.efficiency
    products = operations / layout.ranks / rate * imbalance(shape, work, layout)
    computing = max(products, layout.accumulation * kernels(shape) * device.launch)
    sent = tuple(collectives(shape, work, layout, device))
    return Plan(
        layout=layout, memory=held, operations=operations, computing=computing, collectives=sent,
        fits=held.total <= device.memory,
    )  # fmt: skip


def kernels(shape: ModelShape) -> int:
    """Kernels of a micro-batch, forward and backward, about: a small model takes as long as it takes to start them."""
    return KERNELS_A_BLOCK * len(shape.layers) + KERNELS_A_PART * (len(shape.data.signals) + len(shape.data.tasks) + 4)


def rows_an_expert(shape: ModelShape, work: Workload, layout: Layout) -> float:
    """Rows of a routed expert in a micro-batch (of all ranks of its group), at an even load; the layer with the fewest.

    Infinite in a model without routed experts.
    """
    fewest = math.inf
    for layer in shape.layers:
        routed = [expert for expert in layer.role("routed") if expert.kind != "zero"]
        if layer.dense is None and routed:
            chosen = sum(count * flops.routed_slots(shape, layer, row) for row, count in work.tokens.items())
            fewest = min(fewest, chosen * layout.micro_batch * layout.ep / len(routed))
    return fewest


def imbalance(shape: ModelShape, work: Workload, layout: Layout) -> float:
    """Load of the fullest rank over the mean, by chance: mean + sqrt(2 ln n) deviations, where all are chosen alike."""
    rows = rows_an_expert(shape, work, layout)
    if layout.ep == 1 or math.isinf(rows):
        return 1.0
    routed = min(len(layer.role("routed")) for layer in shape.layers if layer.role("routed"))
    return _fullest(rows * routed / layout.ep, layout.ep)


def _fullest(mean: float, number: int) -> float:
    return 1.0 + math.sqrt(2.0 * math.log(max(number, 2)) / max(mean, 1e-9))


def warnings(shape: ModelShape, work: Workload, plan: Plan, device: Device) -> Iterator[str]:
    """What a user should know."""
    layout, asked = plan.layout, shape.config.train.batch_size
    if layout.batch != asked:
        yield (
            f"train.batch_size {asked} is no multiple of {layout.ranks} ranks: planned for {layout.batch}, which "
            "changes the training"
        )
    rows = rows_an_expert(shape, work, layout)
    if rows < FEW_ROWS:
        yield (
            f"an expert gets {rows:.0f} tokens in a micro-batch: its products are too small to be efficient; fewer "
            "experts, a larger micro-batch or more tokens a sample would help"
        )
    routed = max((len(layer.role("routed")) for layer in shape.layers), default=0)
    if not math.isinf(rows) and routed > 1 and _fullest(rows, routed) > UNEVEN:
        yield (
            f"by chance alone the fullest of {routed} experts gets about {_fullest(rows, routed):.1f} times the mean "
            "in a micro-batch; a router that prefers some makes it more (moemm plan simulate RUN measures that)"
        )
    if plan.computing <= layout.accumulation * kernels(shape) * device.launch:
        yield (
            "the model is too small for the device: a step takes as long as starting its kernels does (assumed, "
            f"{device.launch * 1e6:.0f} us each), whatever its efficiency; a larger micro-batch costs nothing"
        )
    if plan.network > plan.computing:
        share = plan.network / plan.seconds
        yield f"{share:.0%} of a step goes to the network: fewer ranks, or a larger batch, would be used better"
