"""Every way to run the experts of a case, on the same inputs and weights, and whether all compute the same.

T tokens, D width, F expert width, H = 2F rows of the first weight, E experts, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from benchmarks import libraries, peers
from benchmarks.cases import Case
from moemm import ops
from moemm.ops.reference import swiglu

OURS, DENSE = "moe_ffn", "dense"
PACKAGE = {"HF eager": "transformers", "HF grouped": "transformers", "DeepSpeed": "deepspeed", "Tutel": "tutel"}
PADDED = ("DeepSpeed", "Tutel")
NAMES = (OURS, DENSE, "op by op", "loop", "torch grouped", *PACKAGE)
# Relative, of norms: types, and orders of sums, differ between the ways.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
PADDED_LIMIT = 2**32


class DisagreementError(RuntimeError):
    """A way computes something else than moe_ffn: to compare its time would say nothing."""


def names() -> list[str]:
    """The ways that this machine has the packages for."""
    return [name for name in NAMES if name not in PACKAGE or libraries.missing(PACKAGE[name]) is None]


def not_here() -> list[str]:
    """One line for each way that is left out: which, and how to install it."""
    return [
        f"{name} is left out: {PACKAGE[name]} is not installed ({libraries.INSTALL[PACKAGE[name]]})"
        for name in NAMES
        if name not in names()
    ]


@dataclass
class Setting:
    """Inputs and weights of a case; weights in one tensor an expert, and stacked: the same values."""

    case: Case

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        case = self.case
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

    def leaves(self) -> list[torch.Tensor]:
        """All that a step gives a gradient to, but the gates."""
        return [self.x_TD, *self.w1, *self.w2, self.dense1, self.dense2, self.stacked1, self.stacked2]

    def forget(self) -> None:
        """Free the gradients."""
        for leaf in self.leaves():
            leaf.grad = None

    def way(self, name: str) -> libraries.Run:
        """A way as a function of tokens, gates and expert ids. Raises ModuleNotFoundError without its package."""
        lists, stacked = (self.w1, self.w2), (self.stacked1, self.stacked2)
        makers: dict[str, Callable[[], libraries.Run]] = {
            OURS: lambda: lambda x, gates, experts: ops.moe_ffn(x, gates, experts, *lists, activation="swiglu"),
            DENSE: lambda: lambda x, gates, experts: F.linear(swiglu(F.linear(x, self.dense1)), self.dense2),
            "op by op": lambda: lambda x, gates, experts: peers.op_by_op(x, gates, experts, *lists),
            "loop": lambda: lambda x, gates, experts: peers.loop(x, gates, experts, *lists),
            "torch grouped": lambda: lambda x, gates, experts: peers.grouped_mm(x, gates, experts, *stacked),
            "HF eager": lambda: libraries.hugging_face(*stacked, self.case.top_k, None),
            "HF grouped": lambda: libraries.hugging_face(*stacked, self.case.top_k, "grouped_mm"),
            "DeepSpeed": lambda: libraries.deepspeed(*lists),
            "Tutel": lambda: libraries.tutel(*stacked),
        }
        return makers[name]()


def padded_bytes(case: Case, experts_TK: torch.Tensor) -> int:
    """What a way that pads every expert to the fullest holds of inputs, hidden rows and outputs, and gradients."""
    rows = case.experts * int(torch.bincount(experts_TK.flatten()).max())
    return 2 * rows * (2 * case.dim + 3 * case.width) * case.dtype.itemsize


def feasible(case: Case, chosen: Sequence[str], experts_TK: torch.Tensor) -> list[str]:
    """The ways of a case without those that would pad it to more than PADDED_LIMIT bytes."""
    fits = padded_bytes(case, experts_TK) <= PADDED_LIMIT
    return [name for name in chosen if fits or name not in PADDED]


def step(setting: Setting, run: libraries.Run, routing: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward: the output, and the gates with their gradient."""
    gates_TK = routing[0].detach().requires_grad_()
    out_TD = run(setting.x_TD, gates_TK, routing[1])
    out_TD.backward(setting.grad_TD)
    return out_TD, gates_TK


def results(setting: Setting, run: libraries.Run, routing: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients of one step."""
    setting.forget()
    out_TD, gates_TK = step(setting, run, routing)
    of = {
        "output": out_TD.detach(),
        "gradient of the tokens": setting.x_TD.grad,
        "gradient of the gates": gates_TK.grad,
    }
    for label, listed, stacked in (("w1", setting.w1, setting.stacked1), ("w2", setting.w2, setting.stacked2)):
        empty = [torch.zeros_like(one) if one.grad is None else one.grad for one in listed]
        of[f"gradient of {label}"] = torch.stack(empty) if stacked.grad is None else stacked.grad
    setting.forget()
    return of


def check(setting: Setting, ways: dict[str, libraries.Run], routing: Sequence[torch.Tensor]) -> None:
    """Raise DisagreementError where a way's output or gradients are not those of moe_ffn."""
    ours = results(setting, ways[OURS], routing)
    allowed = TOLERANCE[setting.case.dtype]
    for name, run in ways.items():
        if name in (OURS, DENSE):
            continue
        for what, theirs in results(setting, run, routing).items():
            expected = ours[what].double()
            off = float((theirs.double() - expected).norm() / expected.norm())
            if not off <= allowed:  # also where it is NaN
                raise DisagreementError(
                    f"{setting.case.name}: the {what} of {name} is off from that of moe_ffn by {off:.2g} of its norm; "
                    f"at most {allowed:.2g} is allowed. It is no comparison: mend benchmarks/libraries.py or peers.py"
                )
