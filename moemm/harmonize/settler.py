"""From Gram matrices to weights, with what a method keeps from step to step, and a count of what was seen.

L losses, X groups (tokens, samples, modalities, experts, or all together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moemm.exact import ExactBuffers
from moemm.harmonize.registry import Context, find
from moemm.harmonize.weights import Weights, weights
from moemm.points import point

SHARED = ("modality", "expert", "batch")
"""What tokens of several ranks are judged by together."""


@dataclass(slots=True)
class Conflict:
    """What was seen since the last `take`, on this rank; float64 on the stream's device.

    cos_LL, pairs_LL: sum of cosines over groups, and number of groups where both losses meet. against_LL: those whose
    cosine is negative. counts: groups with a loss whose gradient is not finite, and groups whose weights were refused.
    """

    cos_LL: torch.Tensor
    pairs_LL: torch.Tensor
    against_LL: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def none(cls, num_losses: int, device: torch.device) -> Conflict:
        """Nothing seen."""
        cos_LL, pairs_LL, against_LL = torch.zeros(3, num_losses, num_losses, dtype=torch.float64, device=device)
        return cls(cos_LL, pairs_LL, against_LL, torch.zeros(2, dtype=torch.float64, device=device))


class Settler(nn.Module):
    """Weighs losses by Gram matrices of their gradients, which are the same on all ranks or of one rank's own groups.

    method: as for `weights`. losses: their names. per: whose gradients a Gram matrix is of. kept: the method's state,
    as buffers, so that checkpoints have it.
    """

    def __init__(
        self, method: str, losses: Sequence[str], *, per: str = "batch", gamma: float = 0.0, strength: float = 0.5
    ):
        super().__init__()
        self.method, self.losses, self.per = method, tuple(losses), per
        self.context = Context(gamma=gamma, strength=strength, generator=torch.Generator())
        self.seen: Conflict | None = None
        self.told = False
        """Whether the conflicts of this micro-batch are counted already."""
        self.kept = ExactBuffers()  # a module of its own: a method may call its state as it likes
        for name in find(method).keeps:
            self.kept.register_buffer(name, torch.zeros(len(losses), len(losses), dtype=torch.float64))

    @property
    def shared(self) -> bool:
        """Whether what several ranks have is judged together."""
        return self.per in SHARED

    def begin(self, draw: int, gamma: float) -> None:
        """Before a micro-batch or step: what is drawn in it follows from `draw`, the same on all ranks."""
        self.context.generator.manual_seed(draw)  # type: ignore[union-attr]
        self.context.gamma, self.told = gamma, False

    def weigh(self, gram_XLL: torch.Tensor, method: str | None = None) -> Weights:
        """(X, L) weights by the settler's method or another; what is seen of conflicts on the way is counted."""
        point("harmonize")
        self.context.state = dict(self.kept.named_buffers())
        found = weights(gram_XLL, method or self.method, self.context)
        if not self.told:
            self._see(gram_XLL, found.broken, found.refused)
        return found

    def _see(self, gram_XLL: torch.Tensor, broken: int, refused: int) -> None:
        if self.seen is None:
            self.seen = Conflict.none(len(self.losses), gram_XLL.device)
        length_XL = gram_XLL.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()
        both_XLL = length_XL[:, :, None] * length_XL[:, None, :]
        known_XLL = torch.isfinite(gram_XLL) & (both_XLL > 0.0) & (gram_XLL != 0.0)  # exactly 0: nothing in common
        cos_XLL = torch.where(known_XLL, gram_XLL / both_XLL.where(known_XLL, 1.0), 0.0)
        self.seen.cos_LL += cos_XLL.sum(0)
        self.seen.pairs_LL += known_XLL.sum(0)
        self.seen.against_LL += (cos_XLL < 0.0).sum(0)
        self.seen.counts += torch.tensor([broken, refused], device=gram_XLL.device)

    def take(self) -> Conflict | None:
        """What was seen since the last call; None where nothing came by."""
        seen, self.seen = self.seen, None
        return seen
