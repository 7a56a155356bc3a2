"""A plan as plain data, and as tables to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moemm.plan import flops
from moemm.plan.devices import GIB, Cluster
from moemm.plan.layout import Layout
from moemm.plan.parameters import ModelShape, active, active_of, expert_parameters, parameters, trained
from moemm.plan.step import Plan, imbalance, rows_an_expert, warnings
from moemm.plan.workload import Workload, mixture

if TYPE_CHECKING:
    from rich.console import RenderableType

Json = dict[str, Any]
SHOWN = 5
"""Layouts of the grid that are shown."""
MEANING = {
    "weights": "weights that the model computes with",
    "gathered weights": "whole weights that ZeRO-3 fetches and keeps for the backward pass",
    "master weights": "the optimizer's fp32 copy of its part",
    "optimizer": "AdamW's two moments of its part",
    "gradients": "gradients, fp32 from ZeRO 1 on",
    "buckets": "gradients on their way to other ranks",
    "flat copy": "a copy of gradients in one piece",
    "activations": "what the forward pass keeps for the backward pass",
    "permuted rows": "tokens sorted by expert, and experts' hidden units",
    "all-to-all buffers": "tokens that go to other ranks and come back",
    "framework": "libraries, context and code",
}


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked. steps: of the run, None where neither the configuration nor the data say."""

    name: str
    cluster: Cluster
    steps: int | None
    efficiency_from: str


def total_steps(shape: ModelShape) -> int | None:
    """`train.steps`, or what `train.epochs` comes to."""
    train = shape.config.train
    if train.steps is not None:
        return train.steps
    samples = sum(task.samples for task in shape.data.drawing)
    return max(1, -(-round((train.epochs or 1.0) * samples) // train.batch_size)) if samples else None


def host_bytes(shape: ModelShape, cluster: Cluster) -> int:
    """Memory of a node's host that its ranks take while a run starts: each builds the whole model in fp32."""
    return 4 * sum(parameters(shape).values()) * min(cluster.count, cluster.device.node)


def to_dict(shape: ModelShape, work: Workload, plans: Sequence[Plan], question: Question) -> Json:
    """Everything, as JSON types: bytes, seconds, operations; the choice, and the grid."""
    best = plans[0]
    sizes = parameters(shape)
    device = question.cluster.device
    return {
        "config": question.name,
        "data": {
            "source": shape.data.source,
            "mixture": mixture(shape),
            "tokens_per_sample": {_row(row): count for row, count in work.tokens.items()},
            "tokens_per_sample_total": work.total,
        },
        "gpus": {"count": question.cluster.count, **asdict(device), "efficiency_from": question.efficiency_from},
        "parameters": {
            "total": sum(sizes.values()),
            "trained": sum(trained(shape, sizes).values()),
            "dispatched_experts": sum(expert_parameters(shape, sizes).values()),
            "active": active(shape, sizes),
            "active_by_row": {_row(row): active_of(shape, sizes, *row) for row in shape.rows},
            "per_rank": {"held": best.layout.held, "states": best.layout.owned},
        },
        "host_bytes_at_start": host_bytes(shape, question.cluster),
        "operations_per_sample": {"training": flops.training(shape, work), "forward": flops.forward(shape, work)},
        "choice": _plan(best, shape, work, question),
        "warnings": list(warnings(shape, work, best, device)),
        "grid": [_short(plan) for plan in plans],
    }


def _plan(plan: Plan, shape: ModelShape, work: Workload, question: Question) -> Json:
    steps, device = question.steps, question.cluster.device
    hours = None if steps is None else steps * plan.seconds / 3600
    rows = rows_an_expert(shape, work, plan.layout)
    return {
        **_layout(plan.layout),
        "fits": plan.fits,
        "memory": {
            "total": plan.memory.total,
            "available": device.memory,
            "peak_at": plan.memory.moment,
            "parts": plan.memory.parts,
            "moments": dict(plan.memory.moments),
        },
        "operations_per_step": plan.operations,
        "seconds_per_step": plan.seconds,
        "computing": plan.computing,
        "network": plan.network,
        "samples_per_second": plan.layout.batch / plan.seconds,
        "tokens_per_second": plan.layout.batch * work.total / plan.seconds,
        "rows_per_expert": None if rows == float("inf") else rows,
        "expected_imbalance": imbalance(shape, work, plan.layout),
        "collectives": [asdict(one) for one in plan.collectives],
        "steps": steps,
        "hours": hours,
        "gpu_hours": None if hours is None else hours * question.cluster.count,
        "kilowatt_hours": None if hours is None else hours * question.cluster.count * device.watts / 1000,
    }


def _layout(layout: Layout) -> Json:
    return {
        "zero_stage": layout.stage, "ep_size": layout.ep, "micro_batch": layout.micro_batch,
        "accumulation": layout.accumulation, "batch_size": layout.batch,
    }  # fmt: skip


def _short(plan: Plan) -> Json:
    return {
        **_layout(plan.layout), "fits": plan.fits, "memory": plan.memory.total, "computing": plan.computing,
        "network": plan.network, "seconds_per_step": plan.seconds,
    }  # fmt: skip


def _row(row: tuple[str, str | None]) -> str:
    return row[0] if row[1] is None else f"{row[0]} in {row[1]}"


def render(values: Json) -> RenderableType:
    """The choice, its memory, its collectives, the best of the grid, and warnings."""
    from rich.console import Group

    parts: list[RenderableType] = [_choice_table(values), _memory_table(values), _network_table(values)]
    parts += [_grid_table(values), *(f"warning: {text}" for text in values["warnings"])]
    return Group(*(part for part in parts if part is not None))


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left")
    return table


def _choice_table(values: Json) -> Any:
    choice, gpus, sizes = values["choice"], values["gpus"], values["parameters"]
    table = _table(f"{values['config']} on {gpus['count']}x{gpus['name']}", "", "plan", "")
    lines = [
        ("model", f"{sizes['total']:,} parameters", f"{sizes['active']:,} active a token, at most"),
        ("data", f"{values['data']['tokens_per_sample_total']:,.1f} tokens/sample", f"from {values['data']['source']}"),
        ("engine", f"ZeRO {choice['zero_stage']}, ep {choice['ep_size']}", "deepspeed.zero_stage; ranks to a set"),
        (
            "batch", f"{choice['batch_size']} = {choice['micro_batch']} x {choice['accumulation']} x {gpus['count']}",
            "micro-batch x train.accumulation x ranks",
        ),
        ("memory", f"{_gib(choice['memory']['total'])} a rank", f"of {_gib(gpus['memory'])}"),
        (
            "host", f"{_gib(values['host_bytes_at_start'])} a node",
            f"at the start: each of {min(gpus['count'], gpus['node'])} ranks builds the whole model in fp32",
        ),
        (
            "step", f"{_time(choice['seconds_per_step'])}",
            f"{_time(choice['computing'])} computing at {gpus['efficiency']:.0%} of peak ({gpus['efficiency_from']}), "
            f"{_time(choice['network'])} network",
        ),
        ("rate", f"{choice['tokens_per_second']:,.0f} tokens/s", f"{choice['samples_per_second']:,.1f} samples/s"),
    ]  # fmt: skip
    if choice["hours"] is not None:
        lines.append(("run", f"{_time(choice['hours'] * 3600)}", f"{choice['steps']:,} steps"))
        lines.append(
            (
                "cost",
                f"{choice['gpu_hours']:,.2f} GPU-hours",
                f"{choice['kilowatt_hours']:,.2f} kWh at {gpus['watts']} W each",
            )
        )
    for line in lines:
        table.add_row(*line)
    return table


def _memory_table(values: Json) -> Any:
    memory = values["choice"]["memory"]
    table = _table(
        f"memory of a rank, at its peak ({memory['peak_at']})", "part", "bytes", "what it is", right=["bytes"]
    )
    for name, value in sorted(memory["parts"].items(), key=lambda item: -item[1]):
        table.add_row(name, _gib(value), MEANING[name])
    table.add_row("all", _gib(memory["total"]), f"of {_gib(memory['available'])}")
    return table


def _network_table(values: Json) -> Any:
    found = values["choice"]["collectives"]
    if not found:
        return None
    table = _table(
        "collectives of a step, on each rank", "kind", "of", "ranks", "bytes", "time", right=["ranks", "bytes", "time"]
    )
    for one in found:
        table.add_row(one["kind"], one["what"], str(one["ranks"]), _gib(one["payload"]), _time(one["seconds"]))
    return table


def _grid_table(values: Json) -> Any:
    grid = values["grid"]
    fitting = sum(plan["fits"] for plan in grid)
    title = f"the best of {len(grid)} layouts, of which {fitting} fit"
    numbers = ["ZeRO", "ep", "micro-batch", "accumulation", "memory", "step"]
    table = _table(title, *numbers, right=numbers)
    for plan in grid[:SHOWN]:
        own = (plan["zero_stage"], plan["ep_size"], plan["micro_batch"], plan["accumulation"])
        fits = "" if plan["fits"] else " (too much)"
        table.add_row(*map(str, own), _gib(plan["memory"]) + fits, _time(plan["seconds_per_step"]))
    return table


def render_simulation(values: Json) -> RenderableType:
    """A line a number of ranks, with experts dealt out in turn; the placed ones beside it."""
    title = f"{values['run']} on up to {values['gpus']}, ep {values['ep_size']}, ZeRO {values['zero_stage']}"
    numbers = ["ranks", "step", "even work", "+ tokens", "+ experts", "+ speed", "+ network", "efficiency", "placed"]
    table = _table(title, *numbers, right=numbers)
    placed = {point["ranks"]: point for point in values["points"].get("placed", [])}
    for one in values["points"]["in turn"]:
        parts = [_time(one[key]) for key in ("seconds", "even", "tokens", "experts", "jitter", "network")]
        other = placed.get(one["ranks"])
        table.add_row(
            str(one["ranks"]),
            *parts,
            f"{one['efficiency']:.1%}",
            "-" if other is None else f"{other['efficiency']:.1%}",
        )
    return table


def _gib(number: float) -> str:
    """Bytes in a unit that reads well."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f} B"


def _time(seconds: float) -> str:
    """Seconds in a unit that reads well."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if seconds >= (2 * size if unit in ("days", "h", "min") else size):
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def settings(values: Mapping[str, Any]) -> str:
    """The choice as options of `moemm train`."""
    choice = values["choice"]
    options = {"deepspeed.zero-stage": choice["zero_stage"], "train.accumulation": choice["accumulation"]}
    if choice["ep_size"] > 1:
        options["deepspeed.ep-size"] = choice["ep_size"]
    return " ".join(f"--{key} {value}" for key, value in options.items())
