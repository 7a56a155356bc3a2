"""Routers balanced without a loss: their biases move after each step. L layers with a router, E routed experts."""

from __future__ import annotations

import torch

from moemm.distributed import sum_over_ranks
from moemm.models.trunk import Trunk
from moemm.moe import RouterStats


class RouterBalance:
    """Adds up the loads of a step's micro-batches, then moves the biases, the same on every rank."""

    def __init__(self, trunk: Trunk) -> None:
        layers = trunk.routed_layers.values()
        self._layers = [layer for layer in layers if layer.router is not None and layer.router.config.bias_rate]
        self._load_LE: torch.Tensor | None = None

    def add(self, stats: RouterStats | None) -> None:
        """Count one micro-batch of this rank."""
        if self._layers and stats is not None:
            load_LE = stats.load_LME.detach().sum(1)
            self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE

    def step(self) -> None:
        """Move the biases, then begin anew; all ranks together. Does nothing without `model.router.bias_rate`."""
        if self._load_LE is None:
            return
        for layer, load_E in zip(self._layers, sum_over_ranks(self._load_LE), strict=True):
            assert layer.router is not None
            layer.router.update_bias(load_E[layer.column_E])
        self._load_LE = None
