"""Cases that every op is held to: shapes, types, layouts and plans, with plain PyTorch in float64 as the oracle.

    for case in op_cases():
        case.check()

To cover a new op, add a maker of its arguments to MAKERS. T tokens, D width, K slots a token, E experts, R rows.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moemm import ops
from moemm.ops import reference

Arguments = tuple[Any, ...]
"""Tensors, lists of tensors, None."""

SHAPES = (
    (0, 8, 2, 4),
    (1, 1, 1, 1),
    (1, 7, 3, 4),
    (5, 16, 1, 3),
    (33, 17, 2, 8),
    (64, 64, 4, 4),
    (17, 130, 2, 5),
    (9, 65, 8, 8),
)
"""(T, D, K, E): no token, one, one slot, K = E, odd widths, widths around the kernels' block of 64."""
FLOATS = (torch.float64, torch.float32, torch.bfloat16)
INDICES = (torch.int64, torch.int32)
LAYOUTS = ("dense", "apart", "transposed")
PLANS = ("full", "one", "dropped", "padded")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2**-7}
ALIGNMENT = {"full": 1, "one": 16, "dropped": 3, "padded": 4}
NETWORKS = ("grouped_mlp", "moe_ffn")


@dataclass(frozen=True, slots=True)
class OpCase:
    """One call of one op.

    plan: "full": every slot has a row; "one": one expert takes all; "dropped": a third of the slots have no row;
        "padded": each expert's rows are filled up to a multiple of ALIGNMENT; those that plan and grouped_mlp follow
        are aligned in each plan.
    layout: "dense"; "apart": rows with a gap between them; "transposed": columns contiguous.
    """

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    index: torch.dtype
    layout: str
    plan: str

    @property
    def name(self) -> str:
        """permute-33x17-k2-e8-float32-int64-apart-dropped"""
        tokens, width, slots, experts = self.shape
        kinds = "-".join(str(kind).removeprefix("torch.") for kind in (self.dtype, self.index))
        return f"{self.op}-{tokens}x{width}-k{slots}-e{experts}-{kinds}-{self.layout}-{self.plan}"

    def arguments(self, device: str = "cpu") -> Arguments:
        """The same arguments at every call; those of floating type require a gradient."""
        tensors = MAKERS[self.op](self, torch.Generator().manual_seed(zlib.crc32(self.name.encode())))
        return _each(lambda one: _moved(one, device).requires_grad_(one.is_floating_point()), tensors)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return OPTIONS[self.op](self) if self.op in OPTIONS else {}

    def check(self, device: str = "cpu") -> None:
        """Outputs and gradients agree with the oracle's; raises AssertionError where not."""
        arguments = self.arguments(device)
        oracle = _each(_exact, arguments)
        outputs = tensors_of(getattr(ops, self.op)(*arguments, **self.options))
        expected = tensors_of(getattr(reference, self.op)(*oracle, **self.options))
        total, exact_total = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)
        for number, (out, exact) in enumerate(zip(outputs, expected, strict=True)):
            self._close(out, exact, f"output {number}")
            if out.requires_grad:
                weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view_as(out)
                weight = weight.to(out.dtype)
                total, exact_total = total + (out * weight).sum(), exact_total + (exact * weight.double()).sum()
        if total.requires_grad:
            total.backward()
            exact_total.backward()
        for position, (one, exact) in enumerate(zip(tensors_of(arguments), tensors_of(oracle), strict=True)):
            if one.grad is not None or exact.grad is not None:
                assert one.grad is not None, f"{self.name}: argument {position} has no gradient"
                assert exact.grad is not None, f"{self.name}: argument {position} has a gradient, the oracle's none"
                self._close(one.grad, exact.grad, f"gradient of argument {position}")

    def _close(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Within the type's tolerance, times the largest entry for networks: they round what cancels out later."""
        text = f"{self.name}: {what}"
        if not actual.is_floating_point():
            assert torch.equal(actual, expected), text
            return
        largest = expected.abs().max().item() if expected.numel() and self.op in NETWORKS else 0.0
        relative = TOLERANCE[self.dtype]
        absolute = relative * max(1.0, 6 * largest)
        torch.testing.assert_close(
            actual.double(), expected, rtol=relative, atol=absolute, msg=lambda more: f"{text}: {more}"
        )


def op_cases(*names: str) -> Iterator[OpCase]:
    """All cases of the ops `names`; of every op when none is named."""
    kinds = (names or tuple(MAKERS), SHAPES, FLOATS, INDICES, LAYOUTS, PLANS)
    return itertools.starmap(OpCase, itertools.product(*kinds))


def make_plan(
    experts_TK: torch.Tensor, *, kept_TK: torch.Tensor | None = None, alignment: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """order_R and inverse_TK: slots sorted by expert, stable; dropped slots have row -1, padding rows slot -1."""
    slots = torch.arange(experts_TK.numel())
    flat, kept = experts_TK.flatten(), slots if kept_TK is None else slots[kept_TK.flatten()]
    parts = [torch.empty(0, dtype=torch.int64)]
    for expert in range(int(flat.max()) + 1 if flat.numel() else 0):
        own = kept[flat[kept] == expert]
        parts += [own, own.new_full((-len(own) % alignment,), -1)]
    order_R = torch.cat(parts)
    inverse_R = torch.full_like(slots, -1)
    rows = torch.nonzero(order_R >= 0).flatten()
    inverse_R[order_R[rows]] = rows
    return order_R, inverse_R.view_as(experts_TK)


def _plan(case: OpCase, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, _, slots, experts = case.shape
    experts_TK = torch.rand(tokens, experts, generator=generator).topk(slots, dim=1).indices
    if case.plan == "one":
        experts_TK = torch.zeros_like(experts_TK)
    kept_TK = torch.rand(tokens, slots, generator=generator) > 1 / 3 if case.plan == "dropped" else None
    alignment = ALIGNMENT["padded"] if case.plan == "padded" else 1
    order_R, inverse_TK = make_plan(experts_TK, kept_TK=kept_TK, alignment=alignment)
    return order_R.to(case.index), inverse_TK.to(case.index)


def _rows(case: OpCase, count: int, generator: torch.Generator) -> torch.Tensor:
    width = case.shape[1]
    if case.layout == "transposed":
        return torch.randn(width, count, generator=generator).to(case.dtype).t()
    gap = 3 if case.layout == "apart" else 0
    return torch.randn(count, width + gap, generator=generator).to(case.dtype)[:, :width]


def _permute(case: OpCase, generator: torch.Generator) -> Arguments:
    order_R, inverse_TK = _plan(case, generator)
    return _rows(case, case.shape[0], generator), order_R, inverse_TK


def _residual(case: OpCase, generator: torch.Generator) -> torch.Tensor | None:
    """With plans "one" and "dropped"."""
    return _rows(case, case.shape[0], generator) if case.plan in ("one", "dropped") else None


def _combine(case: OpCase, generator: torch.Generator) -> Arguments:
    """bfloat16 rows meet float32 gates with int64 indices, and bfloat16 ones with int32."""
    order_R, inverse_TK = _plan(case, generator)
    gates_TK = torch.rand(inverse_TK.shape, generator=generator)
    mixed = case.dtype == torch.bfloat16 and case.index == torch.int64
    gates_TK = gates_TK if mixed else gates_TK.to(case.dtype)
    return _rows(case, len(order_R), generator), inverse_TK, gates_TK, _residual(case, generator)


def _experts(case: OpCase, generator: torch.Generator) -> Arguments:
    """Plan "padded": the tensor is not contiguous."""
    tokens, _, slots, experts = case.shape
    experts_TK = torch.rand(tokens, experts, generator=generator).topk(slots, dim=1).indices
    if case.plan == "one":
        experts_TK = torch.zeros_like(experts_TK)
    if case.plan == "dropped":
        experts_TK[torch.rand(tokens, slots, generator=generator) < 1 / 3] = -1
    return (experts_TK.to(case.index).t().contiguous().t() if case.plan == "padded" else experts_TK.to(case.index),)


def _route(case: OpCase, generator: torch.Generator) -> Arguments:
    """Plan "one": a modality with a single expert; "dropped": fewer allowed than K; "padded": with a bias.

    int32 stands for a sigmoid router.
    """
    tokens, _, slots, experts = case.shape
    allowed_ME = torch.ones(3, experts, dtype=torch.bool)
    allowed_ME[1] = torch.rand(experts, generator=generator) > 1 / 2
    allowed_ME[1, :slots] = True
    if case.plan in ("one", "dropped"):
        allowed_ME[2] = torch.arange(experts) == experts - 1
    if case.plan == "dropped":
        allowed_ME[1] = torch.arange(experts) < max(1, slots - 1)
    wide = OpCase(case.op, (tokens, experts, slots, experts), case.dtype, case.index, case.layout, case.plan)
    logits_TE = _rows(wide, tokens, generator)
    bias_E = torch.randn(experts, generator=generator).to(case.dtype) if case.plan == "padded" else None
    return logits_TE, torch.randint(0, 3, (tokens,), generator=generator), allowed_ME, bias_E


def _weights(case: OpCase, generator: torch.Generator) -> list[list[torch.Tensor]]:
    """w1, w2, b1, b2 of experts of unequal width, equal for plan "full"; biases with int32."""
    _, width, _, experts = case.shape
    hidden = [16 if case.plan == "full" else 5 + 3 * e for e in range(experts)]
    factor = 2 if _activation(case) == "swiglu" else 1

    def make(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(case.dtype)

    w1, w2 = [make(factor * h, width) for h in hidden], [make(width, h) for h in hidden]
    if case.index == torch.int64:
        return [w1, w2, [], []]
    return [w1, w2, [make(factor * h) for h in hidden], [make(width) for _ in hidden]]


def _activation(case: OpCase) -> str:
    return {"dense": "swiglu", "apart": "gelu", "transposed": "relu2"}[case.layout]


def _moe_ffn(case: OpCase, generator: torch.Generator) -> Arguments:
    (experts_TK,) = _experts(case, generator)
    gates_TK = torch.rand(experts_TK.shape, generator=generator)
    mixed = case.dtype == torch.bfloat16 and case.index == torch.int64
    x_TD = _rows(case, case.shape[0], generator)
    gates_TK = gates_TK if mixed else gates_TK.to(case.dtype)
    return x_TD, gates_TK, experts_TK, *_weights(case, generator), _residual(case, generator)


def _grouped_mlp(case: OpCase, generator: torch.Generator) -> Arguments:
    (experts_TK,) = _experts(case, generator)
    made = reference.plan(experts_TK, num_experts=case.shape[3], alignment=ALIGNMENT[case.plan])
    return _rows(case, len(made[2]), generator), made[1], *_weights(case, generator)


MAKERS: dict[str, Callable[[OpCase, torch.Generator], Arguments]] = {
    "route_topk": _route,
    "plan": _experts,
    "permute": _permute,
    "combine": _combine,
    "grouped_mlp": _grouped_mlp,
    "moe_ffn": _moe_ffn,
}
OPTIONS: dict[str, Callable[[OpCase], dict[str, Any]]] = {
    "route_topk": lambda case: {
        "top_k": case.shape[2],
        "kind": "softmax" if case.index == torch.int64 else "sigmoid",
        "renormalise": case.layout == "apart",
    },
    "plan": lambda case: {"num_experts": case.shape[3], "alignment": ALIGNMENT[case.plan]},
    "grouped_mlp": lambda case: {"activation": _activation(case), "recompute": case.plan == "padded"},
    "moe_ffn": lambda case: {"activation": _activation(case), "recompute": case.plan == "one"},
}


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of arguments or outputs, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for one in value or () for tensor in tensors_of(one)]


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    """A tensor on another device with its strides, which `to` would close up where rows lie apart."""
    if tensor.device.type == device:
        return tensor.detach()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def _each(function: Callable[[torch.Tensor], torch.Tensor], values: Arguments) -> Arguments:
    def apply(one: Any) -> Any:
        if isinstance(one, list):
            return [function(tensor) for tensor in one]
        return None if one is None else function(one)

    return tuple(map(apply, values))


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().requires_grad_() if tensor.is_floating_point() else tensor
