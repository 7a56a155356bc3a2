"""Bytes of one rank at its peak, by what holds them.

A step has three moments that can be the peak; parts are listed as they stand in the largest of them:
- backward: weights, gradients and states, and all that the forward pass kept;
- reduce: activations are gone, the gradients are joined over ranks through flat copies;
- update: the optimizer works on the gradients of its part.
Coefficients of activations were counted with torch.autograd.graph.saved_tensors_hooks on the CPU's operators (fp32
RMSNorm saves two tensors there), those of the engine by reading DeepSpeed 0.19.8; benchmarks/planner.py compares the
sum with processes. On CUDA they stand for the same tensors, unmeasured. T tokens, D width, F hidden units, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moemm.config.deepspeed import BUCKET_SIZE
from moemm.plan.devices import Device
from moemm.plan.flops import slots
from moemm.plan.layout import Layout
from moemm.plan.parameters import Layer, ModelShape, network
from moemm.plan.workload import Workload

ATTENTION = 16.0
"""Of T D: norm 2 and its output, projections 3, norms of queries and keys 2, by sample 3 + 1, output 1; next norm 3."""
AROUND = 10.0
"""Of T D: the stream, the last norm, pooling for the heads."""
BACKWARD = 5.0
"""Of T D: gradients that a block's backward pass holds at once."""
ALIGNMENT = 16
"""Rows that each expert's are rounded up to (csrc)."""
ZERO_CODE = 49e6
"""Bytes of code that ZeRO 1 to 3 bring, most of it in the first step; measured on the CPU."""
EXTRA_SIGMAS = 3.0
"""A micro-batch is taken to be this many deviations larger than the mean."""
LIVE = int(1e9)
"""stage3_max_live_parameters of DeepSpeed: gathered weights that it keeps at most."""
REDUCED = int(5e8)
"""Elements that ZeRO-0 flattens for one all-reduce, at most."""
STATE = 4
"""Bytes of the elements of gradients, states and master weights: fp32."""

Parts = dict[str, float]


@dataclass(frozen=True, slots=True)
class Memory:
    """parts: what holds bytes at the peak. moment: when that is. moments: the bytes of all three."""

    parts: Parts
    moment: str
    moments: Mapping[str, float]

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts.values())


def memory(shape: ModelShape, work: Workload, layout: Layout, device: Device) -> Memory:
    """Of the fullest rank."""
    code = ZERO_CODE if layout.stage and device.name == "cpu" else 0.0
    fixed = {**_weights(layout), "framework": device.base + code}
    passing = {**fixed, **_gathered(layout), **_gradients(shape, layout)}
    moments = {
        "backward": {**passing, **_activations(shape, work, layout, device)},
        "reduce": {**passing, **_reduce(layout)},
        "update": {**fixed, **_update(layout)},
    }
    sums = {name: sum(parts.values()) for name, parts in moments.items()}
    moment = max(sums, key=lambda name: sums[name])
    return Memory({name: value for name, value in moments[moment].items() if value}, moment, sums)


def _weights(layout: Layout) -> Parts:
    """Weights as they stand between steps, the optimizer's copy of them, and AdamW's two moments."""
    held = layout.partition if layout.stage == 3 else layout.held
    master = {"master weights": layout.owned * STATE} if layout.stage else {}
    return {"weights": held * layout.bytes, **master, "optimizer": 2.0 * layout.owned * STATE}


def _gathered(layout: Layout) -> Parts:
    return {"gathered weights": min(layout.held, LIVE) * layout.bytes} if layout.stage == 3 else {}


def _gradients(shape: ModelShape, layout: Layout) -> Parts:
    """Of the backward pass. From ZeRO 1 on gradients pass through a bucket; those of a layer's experts come all at
    once, and wait for it. A flat copy is sent, beside activations where the bucket is full before the end."""
    if layout.stage == 0:
        return {"gradients": layout.trained * layout.bytes}
    layer, bucket = _largest_layer(shape) / layout.ep, min(BUCKET_SIZE, layout.trained)
    if layout.ranks == 1:
        buckets = bucket * layout.bytes
    elif layout.stage == 3:
        buckets = (2 * bucket + layer) * layout.bytes
    else:
        buckets = (max(layer, bucket) + (0 if _sent_last(layout) else bucket)) * layout.bytes
    if layout.stage == 1 and layout.accumulation > 1:
        return {"gradients": layout.trained * STATE, "buckets": buckets}
    return {"gradients": layout.owned * STATE, "buckets": buckets}


def _largest_layer(shape: ModelShape) -> int:
    """Parameters of the dispatched experts of the layer that has most."""
    dim, activation = shape.model.dim, shape.model.activation
    layers = [layer for layer in shape.layers if layer.dense is None]
    sizes = [sum(sum(network(dim, e.width, activation).values()) for e in layer.dispatched) for layer in layers]
    return max(sizes, default=0)


def _reduce(layout: Layout) -> Parts:
    if layout.stage == 0:
        return {"flat copy": min(layout.trained, REDUCED) * layout.bytes}
    return {"flat copy": layout.trained * layout.bytes} if layout.ranks > 1 and _sent_last(layout) else {}


def _sent_last(layout: Layout) -> bool:
    """Whether all gradients of ZeRO 1 or 2 fit into one bucket, which is sent when the backward pass is over."""
    return layout.stage < 3 and layout.trained <= BUCKET_SIZE


def _update(layout: Layout) -> Parts:
    if layout.stage == 0:
        return {"gradients": layout.trained * layout.bytes}
    return {"gradients": layout.owned * STATE, "flat copy": layout.owned * STATE}


def _activations(shape: ModelShape, work: Workload, layout: Layout, device: Device) -> Parts:
    """What the forward pass keeps for the backward pass, and what that needs besides."""
    samples = layout.micro_batch
    factor = 1.0 + EXTRA_SIGMAS * work.spread / max(work.whole, 1e-9) / samples**0.5
    tokens = samples * work.total * factor
    stream = tokens * shape.model.dim * layout.bytes
    blocks = [_block(shape, layer, work, tokens, layout, device) for layer in shape.layers]
    dispatch = [_dispatch(shape, layer, work, tokens, layout, device) for layer in shape.layers]
    sent = [_all_to_all(shape, layer, work, tokens, layout) for layer in shape.layers]
    batch = samples * (work.numbers * 4.0 + sum(work.raw.values()) * 49 * layout.bytes)
    if shape.config.train.activation_checkpointing:
        largest = max(range(len(blocks)), key=lambda number: blocks[number] + dispatch[number])
        kept = len(blocks) * stream + max(blocks[largest] + BACKWARD * stream, AROUND * stream)
        return {
            "activations": kept + batch, "permuted rows": dispatch[largest], "all-to-all buffers": sent[largest],
        }  # fmt: skip
    return {
        "activations": sum(blocks) + AROUND * stream + batch,
        "permuted rows": sum(dispatch),
        "all-to-all buffers": sum(sent),
    }


def _block(shape: ModelShape, layer: Layer, work: Workload, tokens: float, layout: Layout, device: Device) -> float:
    """Bytes that a block keeps, but for what is dispatched."""
    model, dim = shape.model, shape.model.dim
    wide = 4 if model.activation == "swiglu" else 2
    shared = sum(expert.width for expert in layer.role("shared")) if layer.dense is None else layer.dense
    dropout = (2.0 if device.name == "cpu" else 1.0) * dim if model.dropout else 0.0
    routed = len(layer.role("routed")) if layer.dense is None else 0
    elements = tokens * (ATTENTION * dim + 3.0 * model.heads + wide * shared + dropout)
    return elements * layout.bytes + tokens * routed * 4.0 * 4.0


def _rows(shape: ModelShape, layer: Layer, work: Workload, tokens: float) -> float:
    """Rows that experts get in a micro-batch, all ranks' alike."""
    if layer.dense is not None or not layer.dispatched:
        return 0.0
    a_token = sum(count * slots(shape, layer, row) for row, count in work.tokens.items()) / max(work.total, 1e-9)
    return tokens * a_token


def _dispatch(shape: ModelShape, layer: Layer, work: Workload, tokens: float, layout: Layout, device: Device) -> float:
    """Hidden rows that are kept; on CUDA the permuted tokens and the experts' outputs too."""
    rows = _rows(shape, layer, work, tokens)
    if not rows:
        return 0.0
    local = -(-len(layer.dispatched) // layout.ep)
    wide = 2 if shape.model.activation == "swiglu" else 1
    hidden = wide * max(layer.hidden(expert) for expert in layer.dispatched)
    rows += ALIGNMENT / 2 * local
    both = 0.0 if device.name == "cpu" and layout.ep == 1 else 2.0 * shape.model.dim
    return rows * (hidden + both) * layout.bytes


def _all_to_all(shape: ModelShape, layer: Layer, work: Workload, tokens: float, layout: Layout) -> float:
    """Tokens that are sent, and those that come: a row for each token and remote rank, in and out."""
    if layout.ep == 1:
        return 0.0
    return 2.0 * remote_rows(shape, layer, work, layout.ep) * tokens * shape.model.dim * layout.bytes


def remote_rows(shape: ModelShape, layer: Layer, work: Workload, ep: int) -> float:
    """Remote ranks that a token goes to on average, where experts lie evenly and each is chosen as often.

    Of ep ranks a token with s slots misses one with probability (1 - 1/ep)^s, so ep - 1 of them times the rest.
    """
    if layer.dense is not None or not layer.dispatched or ep == 1:
        return 0.0
    met = 0.0
    for row, count in work.tokens.items():
        met += count * (ep - 1) * (1.0 - (1.0 - 1.0 / ep) ** slots(shape, layer, row))
    return met / max(work.total, 1e-9)
