"""Each op of a layer on a GPU against a plain copy on the same device.

    python -m benchmarks.gpu.kernels                # under a minute; needs a CUDA device
    python -m benchmarks.gpu.kernels --device cpu   # tiny shapes, writes nothing

T = 32k tokens, D = 2048, bfloat16. Bytes are those that the op must read and write once, every gathered row counted as
often as it is used. The limit is the measured rate of copying 1 GiB within the device, read and written bytes counted.
Medians of CUDA events; caches are flushed between repetitions.

T tokens, D width, E experts, K slots a token, R = T K rows, M modalities.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.gpu.timing import Clock, copy_bandwidth, finish, options
from benchmarks.record import Row
from moemm import ops

TARGET = 0.80


class Shape(NamedTuple):
    """Sizes of a measurement."""

    tokens: int = 32768
    dim: int = 2048
    experts: int = 64
    top_k: int = 6
    modalities: int = 7

    @property
    def case(self) -> str:
        """bf16, T 32768, D 2048, E 64, k 6"""
        return f"bf16, T {self.tokens}, D {self.dim}, E {self.experts}, k {self.top_k}"


class Measured(NamedTuple):
    """An op, the bytes that it moves, one call of it, and the share of the copy's rate that it has to reach."""

    name: str
    bytes: int
    call: Callable[[], object] | None
    target: float | None = TARGET


TINY = Shape(tokens=64, dim=32, experts=8, top_k=2, modalities=3)


def sizes(shape: Shape) -> dict[str, int]:
    """Bytes that have to move, by op. Logits are float32, ids int64, rows bfloat16."""
    tokens, dim, rows = shape.tokens, shape.dim, shape.tokens * shape.top_k
    logits, slots, row = 4 * tokens * shape.experts, 12 * rows, 2 * dim
    return {
        "route_topk": logits + slots,
        "route_topk backward": 2 * logits + slots,
        "plan": 24 * rows,
        "permute": 2 * rows * row,
        "permute backward": (rows + tokens) * row,
        "combine": (rows + tokens) * row,
        "combine backward": 3 * rows * row,
    }


def kernels(shape: Shape, device: str) -> Iterator[Measured]:
    """The ops, forward and backward, on one routing."""
    torch.manual_seed(0)
    size, backward = sizes(shape), torch.ops.moemm
    tokens, dim = shape.tokens, shape.dim
    logits_TE = torch.randn(tokens, shape.experts, device=device)
    modality_T = torch.randint(0, shape.modalities, (tokens,), device=device)
    allowed_ME = torch.ones(shape.modalities, shape.experts, dtype=torch.bool, device=device)
    routed = ops.route_topk(logits_TE, modality_T, allowed_ME, top_k=shape.top_k)
    plan = ops.plan(routed.experts_TK, num_experts=shape.experts)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, dim, device=device).bfloat16()

    x_TD, grad_TD, y_RD = draw(tokens), draw(tokens), draw(tokens * shape.top_k)
    grads = tuple(torch.ones_like(one) for one in (routed.gates_TK, routed.prob_ME, routed.z_M))
    options = {"kind": "softmax", "renormalise": False}
    calls: dict[str, tuple[Callable[[], object], float | None]] = {
        "route_topk": (lambda: ops.route_topk(logits_TE, modality_T, allowed_ME, top_k=shape.top_k), TARGET),
        "route_topk backward": (
            lambda: backward.route_topk_backward(
                *grads, logits_TE, modality_T, allowed_ME, routed.experts_TK, **options
            ),
            TARGET,
        ),
        # Three launches on half a megabyte: bound by them, not by memory.
        "plan": (lambda: ops.plan(routed.experts_TK, num_experts=shape.experts), None),
        "permute": (lambda: ops.permute(x_TD, plan.order_R, plan.inverse_TK), TARGET),
        "permute backward": (lambda: backward.permute_backward(y_RD, plan.order_R, plan.inverse_TK), TARGET),
        "combine": (lambda: ops.combine(y_RD, plan.inverse_TK, routed.gates_TK), TARGET),
        "combine backward": (
            lambda: backward.combine_backward(grad_TD, y_RD, plan.inverse_TK, routed.gates_TK),
            TARGET,
        ),
    }
    for name, (call, target) in calls.items():
        yield Measured(name, size[name], call, target)


def rows_of(
    one: Measured, case: str, seconds: float | None, deviation: float | None, copy_rate: float | None
) -> list[Row]:
    """Time, and the op's rate over the copy's; without values where nothing was measured."""
    share = None if seconds is None or copy_rate is None else one.bytes / seconds / copy_rate
    spread = None if share is None or not seconds or deviation is None else share * deviation / seconds
    time_us = None if seconds is None else 1e6 * seconds
    return [
        Row(case=case, metric=f"{one.name}: time", value=time_us, unit="us", better="lower"),
        Row(case=case, metric=f"{one.name}: rate / copy", value=share, deviation=spread, target=one.target),
    ]


def measure(shape: Shape, device: str, rounds: int) -> list[Row]:
    """All rows, on a device."""
    clock = Clock(device, flush=True)
    rate = copy_bandwidth(clock, device, size=2**30 if device == "cuda" else 2**16, rounds=rounds)
    rows = [Row(case=shape.case, metric="copy within the device", value=rate / 1e9, unit="GB/s")]
    for one in kernels(shape, device):
        assert one.call is not None
        rows += rows_of(one, shape.case, *clock.typical(one.call, rounds=rounds), rate)
    return rows


def unmeasured(shape: Shape) -> list[Row]:
    """The same rows without values."""
    rows = [Row(case=shape.case, metric="copy within the device", value=None, unit="GB/s")]
    for name, size in sizes(shape).items():
        rows += rows_of(Measured(name, size, None, None if name == "plan" else TARGET), shape.case, None, None, None)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    chosen, began = options(__doc__, arguments), time.perf_counter()
    if chosen.unmeasured:
        rows = unmeasured(Shape())
    else:
        rows = measure(Shape() if chosen.device == "cuda" else TINY, chosen.device, chosen.rounds)
    finish("gpu_kernels", rows, chosen, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
