"""The router's own losses, per layer and modality, of the global batch.

Pooling over layers or modalities hides collapse (one modality on one expert looks balanced in the sum), so every loss
is taken where it arises, averaged over the modalities that have tokens, then over layers. Each is one small function
of `Sums`. L layers, M rows of the expert map (modalities), E routed experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from moemm.config.schema import RouterLossConfig
from moemm.moe.stats import RouterStats

Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)  # without slots: cached_property wants a dict
class Sums:
    """Sums of the global batch, and what the losses make of them.

    allowed_LME: which expert a row may use in a layer. threshold: entropy that `global_entropy` asks for, in nats.
    """

    stats: RouterStats
    allowed_LME: torch.Tensor
    threshold: float

    @cached_property
    def tokens_M(self) -> torch.Tensor:
        """(M,) tokens, at least 1."""
        return self.stats.tokens_M.clamp_min(1.0)

    @cached_property
    def mean_LME(self) -> torch.Tensor:
        """(L, M, E) mean probabilities; rows without tokens are 0."""
        return self.stats.prob_LME / self.tokens_M[None, :, None]

    @cached_property
    def number_LM(self) -> torch.Tensor:
        """(L, M) allowed experts, at least 1."""
        return self.allowed_LME.sum(-1).clamp_min(1)


def _entropy(prob: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(prob.clamp_min(torch.finfo(prob.dtype).tiny)).sum(-1)


def _variation(sums: Sums, mass_LME: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation over the allowed experts, (L, M)."""
    mean_LM1 = (mass_LME.sum(-1) / sums.number_LM)[..., None]
    variance_LM = ((mass_LME - mean_LM1).square() * sums.allowed_LME).sum(-1) / sums.number_LM
    return variance_LM / mean_LM1[..., 0].square().clamp_min(1e-9)


def balance(sums: Sums) -> torch.Tensor:
    """n sum_e f_e p_e over the n allowed experts, f the share of choices, p the mean probability: 1 when even."""
    load_LME = sums.stats.load_LME
    share_LME = load_LME / load_LME.sum(-1, keepdim=True).clamp_min(1.0)
    return sums.number_LM * (share_LME * sums.mean_LME).sum(-1)


def z(sums: Sums) -> torch.Tensor:
    """Mean squared log-sum-exp of the logits."""
    return sums.stats.z_LM / sums.tokens_M


def importance(sums: Sums) -> torch.Tensor:
    """CV^2 of the experts' probability mass."""
    return _variation(sums, sums.mean_LME)


def load(sums: Sums) -> torch.Tensor:
    """CV^2 of the smooth load."""
    return _variation(sums, sums.stats.smooth_LME / sums.tokens_M[None, :, None])


def local_entropy(sums: Sums) -> torch.Tensor:
    """Mean entropy of a token's probabilities, nats."""
    return sums.stats.entropy_LM / sums.tokens_M


def global_entropy(sums: Sums) -> torch.Tensor:
    """max(0, log S - entropy of the mean probabilities): use at least S experts."""
    return (sums.threshold - _entropy(sums.mean_LME)).clamp_min(0.0)


def mutual_information(sums: Sums) -> torch.Tensor:
    """Mean over modalities of H(p_m) less H(mean of p_m), the same for each modality; lower is more specialised."""
    present_M = (sums.stats.tokens_M > 0).to(sums.mean_LME.dtype)
    mixed_LE = (sums.mean_LME * present_M[:, None]).sum(1) / present_M.sum().clamp_min(1.0)
    return _entropy(sums.mean_LME) - _entropy(mixed_LE)[:, None]


def combination(sums: Sums) -> torch.Tensor:
    """Mean cross entropy to the expert of the sample's combination of modalities."""
    return sums.stats.binding_LM / sums.tokens_M


LOSSES: dict[str, Callable[[Sums], torch.Tensor]] = {
    function.__name__: function
    for function in (balance, z, importance, load, local_entropy, global_entropy, mutual_information, combination)
}
"""Name in `model.router.losses` -> (L, M) of each layer and row."""


def router_loss(
    stats: RouterStats,
    *,
    allowed_LME: torch.Tensor,
    config: RouterLossConfig,
    reduce: Reduce | None = None,
    world_size: int = 1,
) -> torch.Tensor:
    """Weighted sum of the losses, scalar.

    `reduce` sums a detached tensor over ranks; the value is then that of the global batch on every rank, and the
    gradient is `world_size` times the local part, so that an average over ranks (what DeepSpeed does) gives the
    gradient of the global loss.
    """
    sums = Sums(_global(stats, reduce, world_size), allowed_LME, math.log(config.min_experts))
    present_M = (sums.stats.tokens_M > 0).to(stats.z_LM.dtype)
    wanted = [(getattr(config, name), function) for name, function in LOSSES.items() if getattr(config, name)]
    total_LM = torch.zeros_like(stats.z_LM)
    for weight, function in wanted:
        total_LM = total_LM + weight * function(sums)
    return (total_LM * present_M).sum() / present_M.sum().clamp_min(1.0) / total_LM.shape[0]


def _global(stats: RouterStats, reduce: Reduce | None, world_size: int) -> RouterStats:
    """All sums over all ranks in one reduction, with gradients to the local part."""
    if reduce is None:
        return stats
    parts = stats.parts
    flat = reduce(torch.cat([part.detach().flatten() for part in parts]))
    totals = [total.view_as(p) for total, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    return RouterStats(
        *(
            total + world_size * (p - p.detach()) if p.requires_grad else total
            for total, p in zip(totals, parts, strict=True)
        )
    )
