"""What is measured on a model that has grown: the same batches through both, and the gradient of its routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from moemm.data.sample import PackedBatch
from moemm.growth.deal import ALL
from moemm.models import Model
from moemm.moe import MoELayer, Router
from moemm.objectives import supervised_losses

Seen = Mapping[str, torch.Tensor]
EXACT = 1e-5
"""Most relative error, in fp32, of what is to compute the same."""
GRADIENT = 1e-5
"""Least norm of a router's gradient over that of its experts': under it there is nothing but rounding."""
LIMITED = ("expert_choice", "batch_priority")
"""Router kinds with a capacity."""


@torch.no_grad()
def seen(model: Model, batches: Sequence[PackedBatch]) -> dict[str, torch.Tensor]:
    """Outputs of every task that has samples there, and `stream`, what the trunk returns, of a model in eval mode."""
    streams: list[torch.Tensor] = []
    handle = model.trunk.register_forward_hook(lambda module, given, out: streams.append(out[0][-1]))
    try:
        found = [model(batch).outputs for batch in batches]
    finally:
        handle.remove()
    outputs = {name: torch.cat([one[name] for one in found]) for name in found[0]}
    return {**{name: value for name, value in outputs.items() if value.numel()}, "stream": torch.cat(streams)}


def relative_error(before: Seen, after: Seen) -> float:
    """The largest of |after - before| / |before| (Euclidean norms), over what both have seen."""
    both = [name for name in before if name in after]
    return max(float((after[name] - before[name]).norm() / before[name].norm().clamp_min(1e-30)) for name in both)


def task_loss(model: Model, batches: Sequence[PackedBatch]) -> torch.Tensor:
    """The sum of all tasks' losses over the batches, whatever the objective of the run is."""
    total = torch.zeros(())
    for batch in batches:
        output = model(batch)
        for outputs in (output.outputs, *output.earlier):
            total = total + torch.stack([*supervised_losses(outputs, batch.targets, model.tasks).values()]).sum()
    return total


def router_gradient(model: Model, batches: Sequence[PackedBatch]) -> float | None:
    """Norm of the gradient of a layer's router over that of its experts, in the layer where it is least.

    None where no router has weights.
    """
    layers = {n: layer for n, layer in model.trunk.routed_layers.items() if list(_rows(layer.router))}
    if not layers:
        return None
    model.zero_grad(set_to_none=True)
    task_loss(model, batches).backward()
    ratios = [
        _norm(list(_rows(layer.router))) / max(_norm(list(layer.experts.parameters())), 1e-30)
        for layer in layers.values()
    ]
    model.zero_grad(set_to_none=True)
    return min(ratios)


@contextmanager
def lifted(model: Model) -> Iterator[bool]:
    """Inside, no router drops a token for want of capacity and none sends one to a zero expert; whether any would."""
    routers = [layer.router for layer in model.trunk.routed_layers.values() if layer.router is not None]
    kept = [(router.config, router.allowed_ME) for router in routers]
    try:
        yield any([_lift(layer) for layer in model.trunk.routed_layers.values()])
    finally:
        for router, (config, allowed_ME) in zip(routers, kept, strict=True):
            router.config, router.allowed_ME = config, allowed_ME


def _lift(layer: MoELayer) -> bool:
    router = layer.router
    assert router is not None
    limited = router.config.kind in LIMITED
    zero_E = torch.tensor([expert.kind == "zero" for expert in layer.map.of_role("routed")])
    closed = bool(zero_E.any()) and router.config.kind != ALL
    if limited:
        router.config = replace(router.config, capacity=2.0 * len(router.ids))
    if closed:
        router.allowed_ME = router.allowed_ME & ~zero_E
    return limited or closed


def _rows(router: Router | None) -> Iterator[torch.nn.Parameter]:
    if router is not None:
        yield from router.rows.parameters()


def _norm(parameters: Sequence[torch.nn.Parameter]) -> float:
    return float(sum(float(one.grad.square().sum()) for one in parameters if one.grad is not None)) ** 0.5
