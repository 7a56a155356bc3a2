"""The experts of a MoE layer on a GPU, forward and backward, against a dense network and other ways to run them.

    python -m benchmarks.gpu.moe_layer                # some two minutes; needs a CUDA device
    python -m benchmarks.gpu.moe_layer --device cpu   # tiny shapes, writes nothing

The limit is a dense SwiGLU network of equal active FLOPs, in bfloat16 as all of them; each way takes turns with it, on
one routing a round, drawn anew each round. Figures are the dense network's time over the way's: medians, by events.
All ways have the same weights, and what a way computes is compared with the loop over experts first: one that differs
by more than 3 % is not timed. Peers that are not installed are skipped, with the reason in their row.

T tokens, D width, F expert width, E experts, K slots a token.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu import peers
from benchmarks.gpu.timing import Clock, finish, options
from benchmarks.record import Row
from moemm.errors import KernelError

OURS = "moe_ffn"
NEAR = 0.03


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and one load: balanced, or with half of all slots on one expert."""

    tokens: int = 32768
    dim: int
    width: int
    experts: int
    top_k: int
    skewed: bool

    @property
    def name(self) -> str:
        """bf16, T 32768, D 2048, F 1408, E 64, k 6, balanced"""
        sizes = f"T {self.tokens}, D {self.dim}, F {self.width}, E {self.experts}, k {self.top_k}"
        return f"bf16, {sizes}, {'half on one expert' if self.skewed else 'balanced'}"

    @property
    def target(self) -> float:
        """The dense network's time over ours."""
        return 0.75 if self.skewed else 0.85

    def routing(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """gates_TK and experts_TK, drawn anew. Slots are drawn one by one, so that a token may name an expert twice:
        else one expert could take no more than 1 / K of them.
        """
        share_E = torch.ones(self.experts, device=device)
        share_E[0] = self.experts - 1 if self.skewed else 1
        flat = torch.multinomial(share_E, self.tokens * self.top_k, replacement=True)
        gates_TK = torch.rand(self.tokens, self.top_k, device=device) / self.top_k
        return gates_TK, flat.view(self.tokens, self.top_k)


LARGE, SMALL = (
    {"dim": 4096, "width": 14336, "experts": 8, "top_k": 2},
    {"dim": 2048, "width": 1408, "experts": 64, "top_k": 6},
)
CASES = tuple(Case(**sizes, skewed=skewed) for sizes in (SMALL, LARGE) for skewed in (False, True))
TINY = tuple(Case(tokens=48, dim=32, width=16, experts=4, top_k=2, skewed=skewed) for skewed in (False, True))


class Setting:
    """Tokens, weights and the clock of a case."""

    def __init__(self, case: Case, device: str):
        torch.manual_seed(0)
        self.case, self.device, self.clock = case, device, Clock(device, flush=False)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, device=device) * scale).bfloat16()

        self.x_TD = draw(case.tokens, case.dim).requires_grad_()
        self.grad_TD = draw(case.tokens, case.dim)
        w1_EHD = draw(case.experts, 2 * case.width, case.dim, scale=case.dim**-0.5)
        w2_EDF = draw(case.experts, case.dim, case.width, scale=case.width**-0.5)
        self.weights = peers.Weights(w1_EHD, w2_EDF, case.top_k)
        self.dense = peers.dense(self.weights)

    def step(self, way: peers.Way, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> float:
        """Seconds of one step, forward and backward, without gradients of an earlier one."""
        gates_TK = gates_TK.clone().requires_grad_()
        for tensor in (self.x_TD, *way.parameters):
            tensor.grad = None
        return self.clock.seconds(lambda: way.forward(self.x_TD, gates_TK, experts_TK).backward(self.grad_TD))

    def compare(self, way: peers.Way) -> None:
        """Raises KernelError where a way computes something else than the loop over experts."""
        routing = self.case.routing(self.device)
        with torch.no_grad():
            wanted_TD = peers.loop(self.weights).forward(self.x_TD, *routing).float()
            given_TD = way.forward(self.x_TD, *routing).float()
        difference = ((given_TD - wanted_TD).norm() / wanted_TD.norm()).item()
        if not difference < NEAR:
            raise KernelError(f"its output differs from the loop's by {difference:.3f}")

    def measure(self, name: str, rounds: int) -> tuple[list[float], list[float]]:
        """Seconds of a way and of the dense network in turn."""
        way = peers.WAYS[name](self.weights)
        self.compare(way)
        pairs = []
        for _ in range(rounds + 3):
            routing = self.case.routing(self.device)
            pairs.append((self.step(way, *routing), self.step(self.dense, *routing)))
        took, limit = zip(*pairs[3:], strict=True)
        return list(took), list(limit)


def rows_of(case: Case, name: str, ratios: Sequence[float], note: str) -> Row:
    """One way's row, without a value where it was not measured."""
    return Row(
        case=case.name,
        metric=f"dense / {name}",
        value=statistics.median(ratios) if ratios else None,
        deviation=statistics.pstdev(ratios) if ratios else None,
        target=case.target if name == OURS else None,
        note=note,
    )


def reason(error: Exception) -> str:
    """Why a way was not measured, in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def measure(case: Case, device: str, rounds: int) -> list[Row]:
    """Rows of one case. What keeps a peer from running is written beside its row; our own failure is raised."""
    setting, limits, rows = Setting(case, device), [], []
    for name in peers.WAYS:
        try:
            took, limit = setting.measure(name, rounds)
        except peers.failures() as error:
            if name == OURS:
                raise
            rows.append(rows_of(case, name, [], reason(error)))
        else:
            limits += limit
            rows.append(rows_of(case, name, [b / a for a, b in zip(took, limit, strict=True)], ""))
        if device == "cuda":
            torch.cuda.empty_cache()
    value = 1e3 * statistics.median(limits)
    return [Row(case=case.name, metric="dense", value=value, unit="ms", better="lower"), *rows]


def unmeasured(case: Case) -> list[Row]:
    """The rows of a case without values."""
    limit = Row(case=case.name, metric="dense", value=None, unit="ms", better="lower")
    return [limit, *(rows_of(case, name, [], "") for name in peers.WAYS)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    chosen, began = options(__doc__, arguments), time.perf_counter()
    rows: list[Row] = []
    for case in CASES if chosen.device == "cuda" or chosen.unmeasured else TINY:
        rows += unmeasured(case) if chosen.unmeasured else measure(case, chosen.device, chosen.rounds)
    finish("gpu_moe_layer", rows, chosen, seconds=time.perf_counter() - began)


if __name__ == "__main__":
    main()
