"""Floating-point operations of a sample, by part: matrix products only, a multiply-add counts as two.

As evaluate/cost.py counts them in a model that runs, and besides: the heads, and the backward pass. T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

from moemm.config.check_objectives import label_free
from moemm.config.experts import Expert, active_experts
from moemm.plan import kinds
from moemm.plan.parameters import PLACE, Layer, ModelShape, network
from moemm.plan.workload import Workload

CAPACITY = 1.25
"""router.capacity when not given, as in moe/routers.py."""


def forward(shape: ModelShape, work: Workload) -> dict[str, float]:
    """part -> operations of the forward pass of one sample."""
    model, dim = shape.model, shape.model.dim
    raw = sum(work.raw.values())
    parts = {
        "tokenizers": sum(2.0 * dim * _products(signal) * work.raw[signal.name] for signal in shape.data.signals),
        "position": 2.0 * PLACE * dim * raw,
        "latents": _latents(shape, work),
        "attention": len(shape.layers) * (8.0 * dim**2 * work.total + 4.0 * dim * work.pairs),
        "experts": sum(_experts(shape, layer, work) for layer in shape.layers),
        "router": sum(_router(shape, layer) * work.total for layer in shape.layers),
        "pooling": 4.0 * dim**2 * work.whole * work.pools * (len(shape.layers) if model.predict_every_block else 1),
        "heads": _heads(shape),
        "objectives": _objectives(shape, work),
    }
    return parts


def training(shape: ModelShape, work: Workload) -> float:
    """Operations of forward and backward pass of one sample: each product again for its input and for its weights.

    Nobody asks for the gradient of what tokenizers and the position read. With activation checkpointing the blocks run
    forward once more.
    """
    parts = forward(shape, work)
    first = parts["tokenizers"] + parts["position"]
    again = sum(parts[name] for name in ("attention", "experts", "router"))
    whole = 3.0 * sum(parts.values()) - first
    return whole + (again if shape.config.train.activation_checkpointing else 0.0)


def routed_slots(shape: ModelShape, layer: Layer, row: tuple[str, str | None]) -> float:
    """Routed experts that a token of a row uses on average, as far as the configuration says."""
    router = shape.model.router
    allowed = [expert for expert in layer.role("routed") if expert.serves(*row)]
    if router.kind == "hard":
        return float(len(allowed))
    if router.kind == "top_p":
        return float(min(router.top_k or len(allowed), max(1, round((router.p or 0.5) * len(allowed)))))
    wanted = float(min(router.top_k or 1, len(allowed)))
    return wanted * (router.capacity or CAPACITY) if router.kind == "expert_choice" and allowed else wanted


def slots(shape: ModelShape, layer: Layer, row: tuple[str, str | None]) -> float:
    """Rows that a token of a row becomes in the dispatch: modality experts that serve it, and routed ones."""
    hard = sum(expert.serves(*row) for expert in layer.role("hard"))
    allowed = [expert for expert in layer.role("routed") if expert.serves(*row)]
    working = sum(expert.kind != "zero" for expert in allowed) / max(len(allowed), 1)
    return hard + routed_slots(shape, layer, row) * working


def most_slots(shape: ModelShape, layer: Layer) -> int:
    """K: columns of a layer's slots, those of the row that has most modality experts, and the routed ones."""
    hard = max(sum(expert.serves(*row) for expert in layer.role("hard")) for row in shape.rows)
    router, routed = shape.model.router, layer.role("routed")
    most = max(sum(expert.serves(*row) for expert in routed) for row in shape.rows)
    top_k = active_experts(router) or most
    return hard + (most if router.kind == "expert_choice" else min(top_k, len(routed)))


def _experts(shape: ModelShape, layer: Layer, work: Workload) -> float:
    dim, activation = shape.model.dim, shape.model.activation
    if layer.dense is not None:
        return 2.0 * sum(network(dim, layer.dense, activation).values()) * work.total
    return sum(count * 2.0 * _met(shape, layer, row) for row, count in work.tokens.items())


def _met(shape: ModelShape, layer: Layer, row: tuple[str, str | None]) -> float:
    """Weights of the experts that a token of a row meets; routed ones at the mean size of those that it may use."""
    serving = [expert for expert in layer.experts if expert.serves(*row)]
    always = sum(_size(shape, layer, expert) for expert in serving if expert.role != "routed")
    routed = [_size(shape, layer, expert) for expert in serving if expert.role == "routed"]
    mean = sum(routed) / len(routed) if routed else 0.0
    return always + mean * routed_slots(shape, layer, row)


def _size(shape: ModelShape, layer: Layer, expert: Expert) -> int:
    return sum(network(shape.model.dim, layer.hidden(expert), shape.model.activation).values())


def _router(shape: ModelShape, layer: Layer) -> float:
    router, routed = shape.model.router, layer.role("routed")
    if not routed or router.kind == "hard":
        return 0.0
    columns = len(routed) * (len(shape.data.names) if router.scope == "modality" else 1)
    return 2.0 * shape.model.dim * (columns + (len(routed) if router.kind == "noisy" else 0))


def _products(signal: kinds.Signal) -> float:
    """Multiply-adds of a token of the tokenizer, for each of D."""
    if signal.kind == "tabular":
        return kinds.NUM_BINS * signal.numeric / max(signal.numeric + len(signal.categories), 1)
    return kinds.inputs(signal)


def _latents(shape: ModelShape, work: Workload) -> float:
    """One attention, in which the latents of each modality of a sample and its tokens see each other."""
    model, dim = shape.model, shape.model.dim
    if not model.latents:
        return 0.0
    total = 0.0
    present: dict[str, float] = dict.fromkeys(shape.data.names, 0.0)
    for (name, _), count in work.tokens.items():
        present[name] += count / model.latents
    for name, count in work.raw.items():
        if present[name]:
            length = count / present[name] + model.latents
            total += present[name] * (8.0 * dim**2 * length + 4.0 * dim * length**2)
    return total


def _heads(shape: ModelShape) -> float:
    """Of the tasks that share a sample: each has a head; of the mixture the mean."""
    from moemm.plan.workload import mixture

    shares = mixture(shape)
    return sum(4.0 * shape.model.dim * task.outputs * shares.get(task.group, 0.0) for task in shape.data.tasks)


def _objectives(shape: ModelShape, work: Workload) -> float:
    """Heads of the objectives without labels."""
    objectives, dim = shape.config.objectives, shape.model.dim
    on = set(label_free(objectives))
    total = 0.0
    if "masked" in on:
        targets: Mapping[str, kinds.Target] = {s.name: kinds.target(s) or kinds.Target() for s in shape.data.signals}
        for name in objectives.masked.modalities or shape.data.names:
            out = targets[name].values + targets[name].classes
            total += 2.0 * dim * (dim + out) * work.raw[name] * objectives.masked.ratio
    if "replaced" in on:
        total += 2.0 * dim * (dim + 1) * work.whole
    if "similarity" in on:
        total += 2 * 2.0 * 4 * dim**2
    if "contrastive" in on:
        total += 2.0 * dim**2 * len(shape.data.names)
    return total
