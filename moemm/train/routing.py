"""The routers' statistics between reports: added up on the device, read once a report."""

from __future__ import annotations

import numpy as np
import torch

from moemm.config.schema import RouterConfig
from moemm.distributed import sum_over_ranks
from moemm.models.trunk import Trunk
from moemm.moe import RouterStats
from moemm.observe.routing import RouterReport, RoutingNames, row_name

PARTS = ("load_LME", "prob_LME", "dropped_LM", "tokens_M")


def routing_names(trunk: Trunk) -> RoutingNames | None:
    """What stands on the axes of the statistics; None for a model without a router."""
    allowed_LME = trunk.allowed()
    if allowed_LME is None:
        return None
    return RoutingNames(
        layers=tuple(trunk.routed_layers),
        rows=tuple(row_name(*row) for row in trunk.map.rows),
        experts=tuple(expert.id for expert in trunk.map.of_role("routed")),
        allowed_LME=allowed_LME.cpu().numpy(),
    )


def balance_advice(config: RouterConfig) -> str:
    """What to change where a router uses too few experts."""
    if config.bias_rate:
        return f"raise model.router.bias_rate (now {config.bias_rate:g}) or model.router.losses.balance"
    return f"raise model.router.losses.balance (now {config.losses.balance:g})"


def few_are_wanted(config: RouterConfig) -> bool:
    """Whether the configuration asks for modalities that keep to few experts: that is no collapse then."""
    losses = config.losses
    return config.kind in ("combination", "hard") or losses.mutual_information > 0 or losses.combination > 0


class RoutingWindow:
    """Sums since the last report, on this rank. One addition a statistic and micro-batch, whatever the layers."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] | None = None

    def add(self, stats: RouterStats | None) -> None:
        """Count one micro-batch; nothing for a model without a router."""
        if stats is None:
            return
        parts = [getattr(stats, name).detach() for name in PARTS]
        if self._sums is None:
            self._sums = [part.double() for part in parts]  # float32 counts to 2^24 only
        else:
            for total, part in zip(self._sums, parts, strict=True):
                total += part

    def take(self) -> RouterReport | None:
        """The sums of all ranks, in one reduction and one transfer (all call it together); then begin anew."""
        if self._sums is None:
            return None
        sums, self._sums = self._sums, None
        flat = sum_over_ranks(torch.cat([part.flatten() for part in sums])).cpu().numpy()
        ends = np.cumsum([part.numel() for part in sums])[:-1]
        arrays = [one.reshape(part.shape) for one, part in zip(np.split(flat, ends), sums, strict=True)]
        return RouterReport(**dict(zip(PARTS, arrays, strict=True)))
