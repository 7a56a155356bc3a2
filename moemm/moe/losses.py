"""Balance and z loss, per layer and modality, of the global batch.

Pooling over layers or modalities hides collapse (one modality on one expert looks balanced in the sum), so both losses
are taken where they arise and averaged over the modalities that have tokens. L layers, M modalities, E routed experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moemm.moe.stats import RouterStats

Reduce = Callable[[torch.Tensor], torch.Tensor]


def router_loss(
    stats: RouterStats,
    *,
    allowed_ME: torch.Tensor,
    balance_weight: float,
    z_weight: float,
    reduce: Reduce | None = None,
    world_size: int = 1,
) -> torch.Tensor:
    """Weighted sum of balance loss (Switch Transformer, arXiv:2101.03961) and z-loss (ST-MoE, arXiv:2202.08906).

    Balance of one layer and modality: n sum_e f_e p_e over its n allowed experts, f_e the share of choices and p_e the
    mean probability; 1 when uniform. `reduce` sums a detached tensor over ranks; the value is then that of the global
    batch on every rank, and the gradient is `world_size` times the local part, so that an average over ranks (what
    DeepSpeed does) gives the gradient of the global loss.
    """
    load_LME, prob_LME, z_LM, tokens_M = _global(stats, reduce, world_size)
    present_M = (tokens_M > 0).float()
    share_LME = load_LME / load_LME.sum(-1, keepdim=True).clamp_min(1.0)
    mean_LME = prob_LME / tokens_M.clamp_min(1.0)[None, :, None]
    balance_LM = allowed_ME.sum(-1) * (share_LME * mean_LME).sum(-1)
    per_token_LM = z_LM / tokens_M.clamp_min(1.0)
    total_LM = balance_weight * balance_LM + z_weight * per_token_LM
    return (total_LM * present_M).sum() / present_M.sum().clamp_min(1.0) / total_LM.shape[0]


def _global(
    stats: RouterStats, reduce: Reduce | None, world_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four sums over all ranks in one reduction, with gradients to the local part of those that have one."""
    parts = [stats.load_LME, stats.prob_LME, stats.z_LM, stats.tokens_M]
    if reduce is None:
        return parts[0], parts[1], parts[2], parts[3]
    flat = reduce(torch.cat([part.detach().flatten() for part in parts]))
    sums = [s.view_as(p) for s, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
    prob, z = (total + world_size * (p - p.detach()) for total, p in zip(sums[1:3], parts[1:3], strict=True))
    return sums[0], prob, z, sums[3]
