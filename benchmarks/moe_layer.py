"""The experts of a MoE layer, forward and backward, against other ways to run them and the limit.

    python -m benchmarks.moe_layer             # or: moemm bench moe; some ten minutes
    python -m benchmarks.moe_layer --threads 1 --rounds 9

The limit is a dense SwiGLU network of equal active FLOPs in plain torch. Ways take turns, with one routing a round,
drawn anew each round as in training. Figures are medians of the ratio to the dense network of the same round:
wall-clock time, or with one thread the CPU time of the process (the machine may be shared).

T tokens, D width, F expert width, E experts, K slots a token.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks import peers, record
from benchmarks.record import Row
from moemm import ops
from moemm.ops.reference import swiglu

Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape. modalities: of sizes that halve, each with experts of its own; 0: every token may use every expert."""

    name: str
    dtype: torch.dtype
    experts: int
    top_k: int
    width: int
    target: float | None
    tokens: int = 4096
    dim: int = 512
    modalities: int = 0
    favour: float = 0.0  # added to the logit of expert 0

    def routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """gates_TK and experts_TK, drawn anew."""
        logits_TE = torch.randn(self.tokens, self.experts)
        logits_TE[:, 0] += self.favour
        number = max(1, self.modalities)
        share_M = 0.5 ** torch.arange(number)
        modality_T = torch.multinomial(share_M, self.tokens, replacement=True)
        owner_E = torch.arange(self.experts) * number // self.experts
        allowed_ME = owner_E == torch.arange(number)[:, None]
        routed = ops.route_topk(logits_TE, modality_T, allowed_ME, top_k=self.top_k)
        return routed.gates_TK, routed.experts_TK


FP32, BF16 = torch.float32, torch.bfloat16
CASES = (
    Case(name="16 experts, k 2, fp32", dtype=FP32, experts=16, top_k=2, width=1024, target=1.0),
    Case(name="16 experts, k 2, bf16", dtype=BF16, experts=16, top_k=2, width=1024, target=1.05),
    Case(name="64 experts, k 4, bf16", dtype=BF16, experts=64, top_k=4, width=256, target=1.6),
    Case(name="7 modalities, 28 experts, fp32", dtype=FP32, experts=28, top_k=2, width=512, modalities=7, target=1.1),
    Case(name="7 modalities, 28 experts, bf16", dtype=BF16, experts=28, top_k=2, width=512, modalities=7, target=1.3),
    Case(name="16 experts, half on one, fp32", dtype=FP32, experts=16, top_k=2, width=1024, favour=2.7, target=None),
    Case(name="8 experts, k 2, 1k tokens, fp32", dtype=FP32, experts=8, top_k=2, width=512, tokens=1024, target=None),
    Case(
        name="16 experts, k 2, 16k tokens, bf16", dtype=BF16, experts=16, top_k=2, width=512, tokens=16384, target=None
    ),
)


class Setting:
    """Inputs and weights of a case, and the ways to run it as functions of gates and experts."""

    def __init__(self, case: Case):
        torch.manual_seed(0)
        self.case = case
        dim, width, dtype = case.dim, case.width, case.dtype

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()

        self.x_TD = torch.randn(case.tokens, dim).to(dtype).requires_grad_()
        self.grad_TD = torch.randn(case.tokens, dim).to(dtype)
        self.w1 = [weight(2 * width, dim) for _ in range(case.experts)]
        self.w2 = [weight(dim, width) for _ in range(case.experts)]
        self.dense1, self.dense2 = weight(2 * width * case.top_k, dim), weight(dim, width * case.top_k)
        self.stacked1 = torch.stack(self.w1).detach().requires_grad_()
        self.stacked2 = torch.stack(self.w2).detach().requires_grad_()
        self.ways: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "dense": lambda gates, experts: F.linear(swiglu(F.linear(self.x_TD, self.dense1)), self.dense2),
            "moe_ffn": lambda gates, experts: ops.moe_ffn(
                self.x_TD, gates, experts, self.w1, self.w2, activation="swiglu"
            ),
            "moemm, op by op": lambda gates, experts: peers.op_by_op(self.x_TD, gates, experts, self.w1, self.w2),
            "loop over experts": lambda gates, experts: peers.loop(self.x_TD, gates, experts, self.w1, self.w2),
            "torch grouped_mm": lambda gates, experts: peers.grouped_mm(
                self.x_TD, gates, experts, self.stacked1, self.stacked2
            ),
        }

    def seconds(self, way: str, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> float:
        """One step, forward and backward."""
        for tensor in (self.x_TD, *self.w1, *self.w2, self.dense1, self.dense2, self.stacked1, self.stacked2):
            tensor.grad = None
        gates_TK = gates_TK.clone().requires_grad_()
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        began = clock()
        self.ways[way](gates_TK, experts_TK).backward(self.grad_TD)
        return clock() - began


def measure(case: Case, rounds: int) -> list[Row]:
    """Rows of one case: every way relative to the dense network."""
    setting = Setting(case)
    seconds: dict[str, list[float]] = {way: [] for way in setting.ways}
    for number in range(rounds + 1):
        routing = case.routing()
        for way in setting.ways:
            took = setting.seconds(way, *routing)
            if number:  # the first round is for warming up
                seconds[way].append(took)
    rows = [
        Row(case=case.name, metric="dense", value=1e3 * statistics.median(seconds["dense"]), unit="ms", better="lower")
    ]
    for way in list(setting.ways)[1:]:
        ratios = [one / limit for one, limit in zip(seconds[way], seconds["dense"], strict=True)]
        value, deviation = statistics.median(ratios), statistics.pstdev(ratios)
        target = case.target if way == "moe_ffn" else None
        rows.append(
            Row(
                case=case.name, metric=f"{way} / dense", value=value, deviation=deviation, better="lower", target=target
            )
        )
    return rows


WORKLOADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": torch.ones_like,
    "linear": lambda e: e + 1,
    "Zipf 1": lambda e: 1 / (e + 1),
    "Zipf 2": lambda e: 1 / (e + 1) ** 2,
    "halving": lambda e: 0.5**e,
    "half on one": lambda e: torch.where(e == 0, 15.0, 1.0),
    "half idle": lambda e: (e % 2 == 0).double(),
    "all on one": lambda e: (e == 3).double(),
}


def imbalance(rounds: int) -> list[Row]:
    """Step time of each load, relative to uniform; and of routing that changes, relative to one that stays."""
    case = Case(
        name="16 experts, k 1, 8k tokens, fp32", dtype=FP32, experts=16, top_k=1, width=512, tokens=8192, target=None
    )
    setting = Setting(case)
    gates_TK = torch.ones(case.tokens, 1)
    seconds: dict[str, list[float]] = {name: [] for name in (*WORKLOADS, "fixed")}
    share_E = torch.arange(case.experts, dtype=torch.float64)
    fixed_TK = torch.randint(0, case.experts, (case.tokens, 1))
    for number in range(rounds + 1):
        for name in seconds:
            weights = WORKLOADS[name](share_E) if name in WORKLOADS else None
            experts_TK = (
                fixed_TK if weights is None else torch.multinomial(weights, case.tokens, replacement=True)[:, None]
            )
            took = setting.seconds("moe_ffn", gates_TK, experts_TK)
            if number:
                seconds[name].append(took)
    rows = []
    for name in WORKLOADS:
        other, base, target = ("fixed", "uniform", 1.05) if name == "uniform" else ("uniform", name, 1.15)
        top, bottom = ("uniform", "fixed") if name == "uniform" else (base, other)
        ratios = [a / b for a, b in zip(seconds[top], seconds[bottom], strict=True)]
        metric = "routing drawn anew / fixed" if name == "uniform" else f"{name} / uniform"
        value, deviation = statistics.median(ratios), statistics.pstdev(ratios)
        rows.append(Row(case=case.name, metric=metric, value=value, deviation=deviation, better="lower", target=target))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began, rows = time.perf_counter(), []
    for case in CASES:
        rows += measure(case, options.rounds)
    rows += imbalance(options.rounds)
    for row in rows:
        row.case += f", {options.threads} threads" if options.threads > 1 else ", 1 thread"
    table = Table("case", "metric", "value", "target")
    for row in rows:
        table.add_row(row.case, row.metric, f"{row.value:.3f}", "" if row.target is None else f"{row.target:.2f}")
    Console().print(table)
    record.write("moe_layer", rows, seeds=[0], seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
