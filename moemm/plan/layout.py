"""How a run stands on ranks: ZeRO stage, expert-parallel groups, micro-batch; and what each rank then holds."""

from __future__ import annotations

from dataclasses import dataclass

from moemm.plan.parameters import ModelShape, Sizes, expert_parameters, parameters, trained

PERSISTENT = 100_000
"""stage3_param_persistence_threshold of DeepSpeed: smaller parameters stay whole on every rank under ZeRO-3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """ranks x ZeRO stage x ep; a step is `accumulation` micro-batches of `micro_batch` samples on each rank.

    dense, experts: parameters outside dispatched experts, and of all of them. frozen: of both, those that never move.
    persistent: parameters that ZeRO-3 keeps whole. bytes: of a weight's element.
    """

    ranks: int
    stage: int
    ep: int = 1
    micro_batch: int
    accumulation: int = 1
    bytes: int
    dense: int
    experts: int
    frozen_dense: int = 0
    frozen_experts: int = 0
    persistent: int = 0

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.ranks * self.micro_batch * self.accumulation

    @property
    def held(self) -> float:
        """Parameters that a rank computes with; experts in full shares of the group."""
        return self.dense + self.experts / self.ep

    @property
    def trained(self) -> float:
        """Those of `held` that have a gradient."""
        return self.held - self.frozen_dense - self.frozen_experts / self.ep

    @property
    def partition(self) -> float:
        """Those of `held` that a rank stores under ZeRO-3."""
        return self.dense / self.ranks + self.experts / self.ep / self.expert_ranks

    @property
    def owned(self) -> float:
        """Parameters whose optimizer state a rank holds."""
        if self.stage == 0:
            return self.trained
        dense, experts = self.dense - self.frozen_dense, self.experts - self.frozen_experts
        return dense / self.ranks + experts / self.ep / self.expert_ranks

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return self.ranks // self.ep


def make_layout(
    shape: ModelShape, *, ranks: int, stage: int, ep: int = 1, micro_batch: int, accumulation: int = 1
) -> Layout:
    """The layout of a model; sizes are counted."""
    sizes = parameters(shape)
    moved = trained(shape, sizes)
    experts, moved_experts = (sum(expert_parameters(shape, one).values()) for one in (sizes, moved))
    total, total_moved = sum(sizes.values()), sum(moved.values())
    return Layout(
        ranks=ranks, stage=stage, ep=ep, micro_batch=micro_batch, accumulation=accumulation,
        bytes=2 if shape.config.train.precision == "bf16" else 4,
        dense=total - experts, experts=experts,
        frozen_dense=total - total_moved - (experts - moved_experts), frozen_experts=experts - moved_experts,
        persistent=_persistent(sizes),
    )  # fmt: skip


def _persistent(sizes: Sizes) -> int:
    return sum(size for size in sizes.values() if size <= PERSISTENT)
