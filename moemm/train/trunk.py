"""Conflicts settled at the trunk: one optimizer step with the gradient of each loss by itself.

The engine passes backward over a step once for each loss, and each time gives this rank's part of the reduced gradient.
The parts of all ranks are disjoint (in ZeRO-0 each is the whole), so products of parts add up to the products of the
gradients of the global batch, exactly; products of gradients that are not reduced yet would not. Then the weighted sum
is put where the engine's step looks for it. ZeRO-3 lets go of weights on the way back, so that there each pass backward
needs its own pass forward, with the same random numbers.

P parameters, L losses; after the losses comes the rest, which nobody weighs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from moemm.checkpoint import random_state
from moemm.data.sample import PackedBatch
from moemm.distributed import sum_over_ranks
from moemm.harmonize import Settler

CHUNK = 1 << 20
"""Elements whose products are taken at a time: they are float64 meanwhile."""


class Passes(Protocol):
    """What is needed of train.engine.Engine."""

    @property
    def keeps_graph(self) -> bool:
        """Whether backward may be called several times after one forward pass."""

    @property
    def shares_gradient(self) -> bool:
        """Whether each rank is given a part of its own."""

    def accumulate(self, loss: torch.Tensor, *, last: bool, retain_graph: bool = False) -> None:
        """Add the gradient of a micro-batch; with `last` reduce what was added up."""

    def take_gradient(self) -> list[torch.Tensor]:
        """This rank's part of each parameter's gradient, which it then has no more."""


Forward = Callable[[PackedBatch, bool], Callable[[int], torch.Tensor]]
"""(micro-batch, whether it passed before in this step) -> number of a part -> that part of the objective."""


class TrunkGradients:
    """What this rank holds of the gradients of L losses and the rest, fp32; None where a parameter's are zeros here."""

    def __init__(self, *, shares: bool) -> None:
        self.shares = shares
        self.parts: list[list[torch.Tensor | None]] = []
        self._zeros: list[torch.Tensor] = []

    @classmethod
    def of_step(
        cls, engine: Passes, batches: Sequence[PackedBatch], forward: Forward, *, num_losses: int, rest: bool
    ) -> TrunkGradients:
        """Those of a step: for each loss a pass backward over its micro-batches, on all ranks together.

        rest: whether there is anything to learn from besides the losses, for one pass more.
        """
        found, num = cls(shares=engine.shares_gradient), num_losses + rest
        if engine.keeps_graph:
            for batch in batches:
                part = forward(batch, False)
                for number in range(num):
                    engine.accumulate(part(number), last=True, retain_graph=number < num - 1)
                    found.add(number, engine.take_gradient())
        else:
            random = random_state.capture()
            for number in range(num):
                random_state.restore(random)
                for micro, batch in enumerate(batches):
                    engine.accumulate(forward(batch, number > 0)(number), last=micro == len(batches) - 1)
                found.add(number, engine.take_gradient())
        if not rest:
            found.parts.append([None] * len(found.parts[0]))
        return found

    def add(self, number: int, gradient: Sequence[torch.Tensor]) -> None:
        """Add to the gradient of this number; the rest has the last one. The tensors are this object's from now on."""
        if number == len(self.parts):
            self.parts.append([None] * len(gradient))
        held = self.parts[number]
        there = torch.stack([one.count_nonzero() for one in gradient]).tolist()
        for place, (one, num) in enumerate(zip(gradient, there, strict=True)):
            if num:
                before = held[place]
                held[place] = one if before is None else before.add_(one)
        self._zeros = [one.new_zeros(()).expand(one.shape) for one in gradient]

    @property
    def num_bytes(self) -> int:
        """What is held on this rank."""
        return sum(one.numel() * one.element_size() for parts in self.parts for one in parts if one is not None)

    def shared(self) -> list[bool]:
        """Of each parameter, whether two losses and more have a gradient other than zero there, on any rank."""
        there_LP = torch.tensor([[one is not None for one in parts] for parts in self.parts[:-1]], dtype=torch.float64)
        there_LP = there_LP.to(self._zeros[0].device)
        if self.shares:
            there_LP = sum_over_ranks(there_LP)
        shared: list[bool] = ((there_LP > 0.0).sum(0) > 1).tolist()
        return shared

    def gram(self, shared: Sequence[bool]) -> torch.Tensor:
        """(L, L) float64: products of the losses' gradients over all parameters that they share, and all ranks."""
        losses = self.parts[:-1]
        gram_LL = torch.zeros(len(losses), len(losses), dtype=torch.float64, device=self._zeros[0].device)
        for number, counts in enumerate(shared):
            there = [(loss, parts[number]) for loss, parts in enumerate(losses) if parts[number] is not None]
            if not counts or not there:
                continue
            index_l = torch.tensor([loss for loss, _ in there], device=gram_LL.device)
            for pieces in zip(*(one.split(CHUNK) for _, one in there if one is not None), strict=True):
                z_ln = torch.stack(pieces).double()
                gram_LL[index_l[:, None], index_l] += z_ln @ z_ln.T
        return sum_over_ranks(gram_LL) if self.shares else gram_LL

    def settled(self, settler: Settler) -> tuple[list[torch.Tensor], bool]:
        """The weighted sum where losses meet, the plain one elsewhere; and whether the products were finite.

        If they were not, nothing is weighed: such a gradient must not be applied. Uses up what is held.
        """
        shared = self.shared()
        gram_LL = self.gram(shared)
        if not bool(torch.isfinite(gram_LL).all()):
            return self._sum([1.0] * len(self.parts), shared), False
        w_L = settler.weigh(gram_LL[None]).w[0].tolist()
        return self._sum([*w_L, 1.0], shared), True

    def _sum(self, weights: Sequence[float], shared: Sequence[bool]) -> list[torch.Tensor]:
        found = []
        for number, (zeros, weighed) in enumerate(zip(self._zeros, shared, strict=True)):
            total: torch.Tensor | None = None
            for parts, weight in zip(self.parts, weights, strict=True):
                one, parts[number] = parts[number], None
                if one is None:
                    continue
                one = one.mul_(weight if weighed else 1.0)
                total = one if total is None else total.add_(one)
            found.append(zeros.clone() if total is None else total)
        return found
