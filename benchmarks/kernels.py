"""Each op of a layer against a plain copy of the bytes that it has to move.

    python -m benchmarks.kernels               # or: moemm bench kernels; under a minute
    python -m benchmarks.kernels --threads 1 --rounds 15

Bytes are those that the op must read and write once, every gathered row counted as often as it is used. The limit is
torch's clone of a buffer of half as many bytes in the same round: it reads one half and writes the other to new memory.
Figures are medians: wall-clock time, or with one thread the CPU time of the process (the machine may be shared).

T tokens, D width, E experts, K slots a token, R = T K rows, M modalities.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.record import Row
from moemm import ops

T, D, E, K, M = 8192, 512, 64, 4, 7
R = T * K


class Measured(NamedTuple):
    """An op, the bytes that it moves and one call of it."""

    name: str
    bytes: int
    call: Callable[[], object]


def kernels(dtype: torch.dtype) -> Iterator[Measured]:
    """The memory-bound ops, forward and backward, on one routing."""
    torch.manual_seed(0)
    size, index = dtype.itemsize, 8
    logits_TE, modality_T = torch.randn(T, E, requires_grad=True), torch.randint(0, M, (T,))
    allowed_ME = torch.ones(M, E, dtype=torch.bool)
    routed = ops.route_topk(logits_TE, modality_T, allowed_ME, top_k=K)
    plan = ops.plan(routed.experts_TK, num_experts=E)
    x_TD, y_RD = torch.randn(T, D).to(dtype), torch.randn(R, D).to(dtype)
    gates_TK, grad_TD = routed.gates_TK.detach(), torch.randn(T, D).to(dtype)
    total = routed.gates_TK.sum() + routed.prob_ME.square().sum() + routed.z_M.sum()
    backward = torch.ops.moemm
    if dtype == torch.float32:
        slots = T * K * (4 + index)
        yield Measured("route_topk", T * E * 4 + slots, lambda: ops.route_topk(
            logits_TE.detach(), modality_T, allowed_ME, top_k=K))  # fmt: skip
        yield Measured("route_topk backward", 2 * T * E * 4 + slots, lambda: torch.autograd.grad(
            total, logits_TE, retain_graph=True))  # fmt: skip
        yield Measured("plan", 3 * R * index, lambda: ops.plan(routed.experts_TK, num_experts=E))
    yield Measured("permute", 2 * R * D * size, lambda: ops.permute(x_TD, plan.order_R, plan.inverse_TK))
    yield Measured("permute backward", (R + T) * D * size, lambda: backward.permute_backward(
        y_RD, plan.order_R, plan.inverse_TK))  # fmt: skip
    yield Measured("combine", (R + T) * D * size, lambda: ops.combine(y_RD, plan.inverse_TK, gates_TK))
    yield Measured("combine backward", 3 * R * D * size, lambda: backward.combine_backward(
        grad_TD, y_RD, plan.inverse_TK, gates_TK))  # fmt: skip


def seconds(call: Callable[[], object]) -> float:
    """One call."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    return clock() - began


def measure(one: Measured, case: str, rounds: int) -> list[Row]:
    """Time, rate, and the copy's time over the op's."""
    source = torch.ones(max(1, one.bytes // 8))
    took, copied = [], []
    for number in range(rounds + 2):
        pair = seconds(one.call), seconds(source.clone)
        if number >= 2:
            took.append(pair[0])
            copied.append(pair[1])
    typical = statistics.median(took)
    share = [copy / op for copy, op in zip(copied, took, strict=True)]
    return [
        Row(case=case, metric=f"{one.name}: time", value=1e3 * typical, unit="ms", better="lower"),
        Row(case=case, metric=f"{one.name}: bytes", value=one.bytes / 1e6, unit="MB", better="lower"),
        Row(case=case, metric=f"{one.name}: rate", value=one.bytes / typical / 1e9, unit="GB/s"),
        Row(
            case=case,
            metric=f"{one.name}: copy / op",
            value=statistics.median(share),
            deviation=statistics.pstdev(share),
        ),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began, rows = time.perf_counter(), []
    for dtype in (torch.float32, torch.bfloat16):
        for one in kernels(dtype):
            case = f"{str(dtype).removeprefix('torch.')}, {options.threads} thread{'s' * (options.threads > 1)}"
            rows += measure(one, case, options.rounds)
    table = Table("case", "metric", "value", "")
    for row in rows:
        table.add_row(row.case, row.metric, f"{row.value:.3f}", row.unit)
    Console().print(table)
    record.write("kernels", rows, seeds=[0], seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
