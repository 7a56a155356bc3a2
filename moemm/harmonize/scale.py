"""The loss-scale family: weights that follow from what the losses are worth over time, not from their conflicts.

They multiply the losses before the backward pass, so gradients meet (fork.py) as these weights left them. All rules
work on losses that were summed over ranks, in float64: every rank finds the same weights, for any number of ranks.

L losses; F losses as the fork tells them apart; T tokens, D width, B branches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from moemm.config.schema import HarmonizeConfig
from moemm.exact import ExactBuffers
from moemm.harmonize.fork import gram_matrices

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""The sum of a tensor over ranks."""
TINY = 1e-8
TEMPERATURE = 2.0
"""Of DWA."""
DECAY = 1e-3
"""gamma of FAMO: pulls its logits back to 0."""
FLOOR = 1e-3
"""No weight of GradNorm is less: a gradient step could make it negative."""
BETAS = (0.9, 0.999)


class Means(NamedTuple):
    """mean_L: mean of each loss over its samples, 0 where it has none. known_L: bool, has samples and is finite."""

    mean_L: torch.Tensor
    known_L: torch.Tensor

    @classmethod
    def of(cls, sums_2L: torch.Tensor) -> Means:
        """From (sum of a loss, number of its samples)."""
        known_L = torch.isfinite(sums_2L).all(0) & (sums_2L[1] > 0.0)
        return cls(torch.where(known_L, sums_2L[0] / sums_2L[1].where(known_L, 1.0), 0.0), known_L)


class LossScale(ExactBuffers, ABC):
    """Weighs losses in every micro-batch, and learns from them once a step. Its state are buffers: checkpoints have it.

    losses: names. reduce: sum over ranks; every rank calls `weigh` and `step` together. options: `harmonize`.
    """

    def __init__(self, losses: Sequence[str], options: HarmonizeConfig, *, reduce: Reduce):
        super().__init__()
        self.losses, self.options, self.reduce = tuple(losses), options, reduce
        self._step_2L: torch.Tensor | None = None
        self._shown_2L: torch.Tensor | None = None
        self._factor_L = torch.ones(len(losses), dtype=torch.float64)

    def keep(self, *names: str, value: float = 0.0) -> None:
        """Make (L,) float64 buffers of these names."""
        for name in names:
            self.register_buffer(name, torch.full((len(self.losses),), value, dtype=torch.float64))

    def forward(self) -> torch.Tensor | None:
        """(L,) what the engine's optimizer learns for `weigh`; None where it learns nothing.

        To be called in the model's forward, where ZeRO-3 has the weights together.
        """
        return None

    def weigh(
        self, sums_2L: torch.Tensor, own_L: torch.Tensor, learned_L: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(L,) float32 weight of each loss in this micro-batch, and a scalar to add to what the engine gets.

        sums: (sum of a loss over this rank's samples, number of them), detached. own: factors that they have besides.
        The weights of the losses that are there sum to their number; that of a loss which is absent or not finite is 1.
        The scalar is 0, and has the gradient of `learned`.
        """
        total_2L = self.reduce(sums_2L.double())
        found = Means.of(total_2L)
        total_2L = torch.where(found.known_L, total_2L, 0.0)
        self._step_2L = total_2L if self._step_2L is None else self._step_2L + total_2L
        learned_L = None if learned_L is None else learned_L.double()
        score_L = self.scores(found, None if learned_L is None else learned_L.detach())
        share_L = score_L.masked_fill(~found.known_L, -torch.inf).softmax(0)
        w_L = torch.where(found.known_L, share_L * found.known_L.sum(), 1.0)
        self._factor_L = (w_L * own_L.double()).detach()
        self._show(w_L, found.known_L)
        term = w_L.new_zeros(()) if learned_L is None else self.penalty(found, learned_L)
        return w_L.float(), (term - term.detach()).float()

    @abstractmethod
    def scores(self, found: Means, learned_L: torch.Tensor | None) -> torch.Tensor:
        """(L,) float64 logarithms of the weights, up to a constant, for the losses of a micro-batch."""

    def penalty(self, found: Means, learned_L: torch.Tensor) -> torch.Tensor:
        """Scalar that `learned` is to minimise."""
        return 0.0 * learned_L.sum()

    def step(self) -> None:
        """After an optimizer step: learn from the losses of its micro-batches, which count as one batch."""
        if self._step_2L is None:
            return
        total_2L, self._step_2L = self._step_2L, None
        with torch.no_grad():
            self.update(total_2L)

    def forget(self) -> None:
        """Leave the micro-batches since the last step out: theirs is not applied."""
        self._step_2L = None

    def update(self, total_2L: torch.Tensor) -> None:
        """Change the state by the losses of a step: their sum over samples and ranks, and the number of samples."""

    def _show(self, w_L: torch.Tensor, known_L: torch.Tensor) -> None:
        shown_2L = torch.stack([w_L * known_L, known_L.double()])
        self._shown_2L = shown_2L if self._shown_2L is None else self._shown_2L + shown_2L

    def take(self) -> dict[str, float]:
        """Loss -> mean weight over the micro-batches since the last call that had it."""
        shown_2L, self._shown_2L = self._shown_2L, None
        if shown_2L is None:
            return {}
        sums, counts = shown_2L.tolist()
        return {name: a / n for name, a, n in zip(self.losses, sums, counts, strict=True) if n}


class Uncertainty(LossScale):
    """w = exp(-s), s learned by the engine to minimise (exp(-s) loss + s) / 2 (arXiv:1705.07115)."""

    def __init__(self, losses: Sequence[str], options: HarmonizeConfig, *, reduce: Reduce):
        super().__init__(losses, options, reduce=reduce)
        self.log_variance_L = nn.Parameter(torch.zeros(len(losses)))

    def forward(self) -> torch.Tensor:
        """(L,) log variances; a copy, because ZeRO-3 takes the parameter away again."""
        return self.log_variance_L.double()

    def scores(self, found: Means, learned_L: torch.Tensor | None) -> torch.Tensor:
        """See LossScale."""
        assert learned_L is not None
        return -learned_L

    def penalty(self, found: Means, learned_L: torch.Tensor) -> torch.Tensor:
        """See LossScale. The losses of all ranks, so that each rank's gradient is already the mean over ranks."""
        return 0.5 * (found.known_L * ((-learned_L).exp() * found.mean_L + learned_L)).sum()


class DynamicAverage(LossScale):
    """DWA (arXiv:1803.10704): w = softmax(r / 2), r the ratio of a loss's last two means over `scale_window` steps."""

    last_L: torch.Tensor
    before_L: torch.Tensor
    sum_L: torch.Tensor
    count_L: torch.Tensor
    steps: torch.Tensor

    def __init__(self, losses: Sequence[str], options: HarmonizeConfig, *, reduce: Reduce):
        super().__init__(losses, options, reduce=reduce)
        self.keep("last_L", "before_L", "sum_L", "count_L")
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def scores(self, found: Means, learned_L: torch.Tensor | None) -> torch.Tensor:
        """See LossScale."""
        known_L = (self.before_L > 0.0) & (self.last_L > 0.0)
        return torch.where(known_L, self.last_L / self.before_L.where(known_L, 1.0), 1.0) / TEMPERATURE

    def update(self, total_2L: torch.Tensor) -> None:
        """See LossScale. A loss without a sample in the whole window keeps its ratio."""
        self.sum_L += total_2L[0]
        self.count_L += total_2L[1]
        self.steps += 1
        if int(self.steps) < self.options.scale_window:
            return
        mean_L, known_L = Means.of(torch.stack([self.sum_L, self.count_L]))
        self.before_L.copy_(torch.where(known_L, self.last_L, self.before_L))
        self.last_L.copy_(torch.where(known_L, mean_L, self.last_L))
        for buffer in (self.sum_L, self.count_L, self.steps):
            buffer.zero_()


class _Adam(LossScale):
    """Rules that move a vector by Adam, of rate `scale_rate`; entries without a gradient stay as they are."""

    first_L: torch.Tensor
    second_L: torch.Tensor
    moves_L: torch.Tensor

    def __init__(self, losses: Sequence[str], options: HarmonizeConfig, *, reduce: Reduce):
        super().__init__(losses, options, reduce=reduce)
        self.keep("first_L", "second_L", "moves_L")

    def move(self, value_L: torch.Tensor, gradient_L: torch.Tensor, where_L: torch.Tensor) -> None:
        """One step against the gradient, in place."""
        self.moves_L += where_L
        for moment_L, power, beta in ((self.first_L, 1, BETAS[0]), (self.second_L, 2, BETAS[1])):
            moment_L.copy_(torch.where(where_L, beta * moment_L + (1.0 - beta) * gradient_L**power, moment_L))
        moves_L = self.moves_L.clamp_min(1.0)
        first_L = self.first_L / (1.0 - BETAS[0] ** moves_L)
        second_L = self.second_L / (1.0 - BETAS[1] ** moves_L)
        value_L -= where_L * self.options.scale_rate * first_L / (second_L.sqrt() + TINY)


class Famo(_Adam):
    """FAMO (arXiv:2306.03792): w ~ softmax(logits) / loss; logits fall for losses whose logarithm falls faster."""

    logits_L: torch.Tensor
    previous_L: torch.Tensor

    def __init__(self, losses: Sequence[str], options: HarmonizeConfig, *, reduce: Reduce):
        super().__init__(losses, options, reduce=reduce)
        self.keep("logits_L", "previous_L")

    def scores(self, found: Means, learned_L: torch.Tensor | None) -> torch.Tensor:
        """See LossScale."""
        return self.logits_L - (found.mean_L.clamp_min(0.0) + TINY).log()

    def update(self, total_2L: torch.Tensor) -> None:
        """See LossScale."""
        mean_L, known_L = Means.of(total_2L)
        both_L = known_L & (self.previous_L > 0.0)
        if bool(both_L.any()):
            now_L = mean_L.clamp_min(0.0) + TINY
            fallen_L = torch.where(both_L, self.previous_L.where(both_L, 1.0).log() - now_L.log(), 0.0)
            share_L = self.logits_L.masked_fill(~both_L, -torch.inf).softmax(0)
            gradient_L = share_L * (fallen_L - (share_L * fallen_L).sum()) + DECAY * self.logits_L
            self.move(self.logits_L, gradient_L, both_L)
        self.previous_L.copy_(torch.where(known_L, mean_L.clamp_min(0.0) + TINY, self.previous_L))


class GradNorm(_Adam):
    """GradNorm (arXiv:1711.02257): gradients of equal length at the end of the trunk, longer for losses that lag."""

    weight_L: torch.Tensor
    initial_L: torch.Tensor

    def __init__(self, losses: Sequence[str], options: HarmonizeConfig, *, reduce: Reduce):
        super().__init__(losses, options, reduce=reduce)
        self.keep("weight_L", value=1.0)
        self.keep("initial_L")
        self._squares_L: torch.Tensor | None = None

    def forget(self) -> None:
        """See LossScale."""
        super().forget()
        self._squares_L = None

    def scores(self, found: Means, learned_L: torch.Tensor | None) -> torch.Tensor:
        """See LossScale."""
        return self.weight_L.log()

    def watch(self, z_TBD: torch.Tensor, loss_TB: torch.Tensor, number_F: torch.Tensor) -> None:
        """Add up what the gradients of a micro-batch are worth, without their weights and factors.

        z, loss: of the branches, as the fork has them; number: which of these losses each of the fork's is, or -1.
        """
        own_TB = torch.where(loss_TB >= 0, number_F.to(loss_TB.device)[loss_TB.clamp_min(0)], -1)
        all_T = torch.zeros_like(loss_TB[:, 0])
        (gram_LL,) = gram_matrices(z_TBD, own_TB, all_T, (1, len(self.losses)))
        squares_L = gram_LL.diagonal().nan_to_num(0.0, 0.0, 0.0) / (self._factor_L**2).clamp_min(TINY**2)
        squares_L = torch.where(self._factor_L > 0.0, squares_L, 0.0)
        self._squares_L = squares_L if self._squares_L is None else self._squares_L + squares_L

    def update(self, total_2L: torch.Tensor) -> None:
        """See LossScale."""
        squares_L, self._squares_L = self._squares_L, None
        length_L = self.reduce(torch.zeros_like(self.weight_L) if squares_L is None else squares_L).sqrt()
        mean_L, known_L = Means.of(total_2L)
        self.initial_L.copy_(torch.where(known_L & (self.initial_L == 0.0), mean_L, self.initial_L))
        both_L = known_L & (length_L > 0.0) & (self.initial_L > 0.0)
        number = both_L.sum()
        if int(number) < 2:
            return
        length_L = torch.where(both_L, length_L, 0.0) * number / length_L[both_L].sum()
        rate_L = torch.where(both_L, mean_L / self.initial_L.where(both_L, 1.0), 0.0)
        lag_L = rate_L * number / rate_L.sum().clamp_min(TINY)
        target_L = (self.weight_L * length_L).sum() / number * lag_L**self.options.scale_alpha
        gradient_L = (self.weight_L * length_L - target_L).sign() * length_L
        self.move(self.weight_L, gradient_L, both_L)
        self.weight_L.clamp_min_(FLOOR)
        self.weight_L.mul_(len(self.losses) / self.weight_L.sum())


SCALES: dict[str, type[LossScale]] = {
    "uncertainty": Uncertainty,
    "dwa": DynamicAverage,
    "famo": Famo,
    "gradnorm": GradNorm,
}
"""`harmonize.scale` -> its rule."""
