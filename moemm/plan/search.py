"""The best of ZeRO x ep x micro-batch that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moemm.errors import ConfigError
from moemm.plan.devices import GIB, Cluster
from moemm.plan.layout import Layout, make_layout
from moemm.plan.parameters import ModelShape
from moemm.plan.step import Plan, make_plan
from moemm.plan.workload import Workload

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is given beforehand; None: to be found."""

    stage: int | None = None
    ep: int | None = None
    micro_batch: int | None = None


def layouts(shape: ModelShape, ranks: int, wanted: Wanted) -> Iterator[Layout]:
    """Every layout of the grid: batches that ranks do not divide are rounded up to their next multiple."""
    train = shape.config.train
    a_rank = -(-train.batch_size // ranks)
    stages: tuple[int, ...] = STAGES if wanted.stage is None else (wanted.stage,)
    if train.precision == "bf16":
        stages = tuple(stage for stage in stages if stage)
    first = make_layout(shape, ranks=ranks, stage=stages[0] if stages else 1, micro_batch=a_rank)
    for stage in stages:
        for ep in ep_sizes(shape, ranks, wanted):
            for accumulation in _divisors(a_rank):
                micro = a_rank // accumulation
                if wanted.micro_batch in (None, micro):
                    yield replace(first, stage=stage, ep=ep, micro_batch=micro, accumulation=accumulation)


def ep_sizes(shape: ModelShape, ranks: int, wanted: Wanted) -> Sequence[int]:
    """Sizes of expert-parallel groups: those that divide the ranks, and leave each rank an expert of every layer."""
    fewest = min((len(layer.dispatched) for layer in shape.layers if layer.dispatched), default=1)
    if shape.model.moe == "dense":
        fewest = 1
    sizes = [size for size in _divisors(ranks) if size <= fewest]
    if wanted.ep is None:
        return sizes
    if wanted.ep not in sizes:
        raise ConfigError(
            f"--ep {wanted.ep}: is no size of expert-parallel groups here\n"
            f"  allowed: {', '.join(map(str, sizes))} (divisors of {ranks} ranks, at most {fewest} dispatched experts)"
        )
    return [wanted.ep]


def search(shape: ModelShape, work: Workload, cluster: Cluster, wanted: Wanted) -> list[Plan]:
    """All plans of the grid, those that fit first, the fastest first; among equals the simpler one.

    Raises ConfigError where none fits, with the nearest and what would help.
    """
    plans = [make_plan(shape, work, layout, cluster.device) for layout in layouts(shape, cluster.count, wanted)]
    if not plans and wanted.stage == 0:
        raise ConfigError("--zero 0: train.precision is bf16, which needs deepspeed.zero_stage >= 1")
    if not plans:
        raise ConfigError(
            f"--micro-batch {wanted.micro_batch}: with {cluster.count} ranks a rank has "
            f"{-(-shape.config.train.batch_size // cluster.count)} samples a step\n  allowed: divisors of that"
        )
    plans.sort(key=lambda plan: (not plan.fits, *_order(plan)))
    if not plans[0].fits:
        raise nothing_fits(min(plans, key=lambda plan: plan.memory.total), cluster)
    return plans


def _order(plan: Plan) -> tuple[float, ...]:
    """By time to three digits, then by what is simpler: a lower stage, a smaller group, fewer micro-batches."""
    if not plan.fits:
        return (plan.memory.total,)
    return float(f"{plan.seconds:.2e}"), plan.layout.stage, plan.layout.ep, plan.layout.accumulation


def nothing_fits(nearest: Plan, cluster: Cluster) -> ConfigError:
    """The error of a model that is too large, with what holds its memory and what to do."""
    layout, held = nearest.layout, nearest.memory
    parts = sorted(held.parts.items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {value / GIB:.1f} GiB" for name, value in parts)
    states = sum(held.parts.get(name, 0.0) for name in ("weights", "gathered weights", "master weights", "optimizer"))
    advice = ["take more GPUs (their states are sharded), or GPUs with more memory"]
    if held.parts.get("activations", 0.0) > states:
        advice = ["set train.activation_checkpointing: true", "lower train.batch_size, or --tokens", *advice]
    todo = "".join(f"\n  to do: {line}" for line in advice)
    return ConfigError(
        f"nothing fits into {cluster.text}: the nearest needs {held.total / GIB:.1f} GiB a rank, "
        f"{cluster.device.memory / GIB:.1f} GiB are there\n"
        f"  nearest: ZeRO {layout.stage}, ep {layout.ep}, micro-batch {layout.micro_batch}; {shown}{todo}"
    )


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]
