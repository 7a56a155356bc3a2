"""Tokens of one modality through the hard experts of another, for as long as a question takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from moemm.errors import ConfigError
from moemm.moe.layer import MoELayer


@contextmanager
def redirected(model: nn.Module, experts_of: Mapping[str, str]) -> Iterator[None]:
    """In every MoE layer of `model`, tokens of a modality run through the modality experts of another.

    experts_of: modality -> the modality whose hard experts its tokens get in place of their own; where experts depend
    on the task, those of the same task. Router and shared experts are as before; on exit, also by an exception,
    everything is. For evaluation: a checkpoint does not hold it.
    Raises ConfigError for a modality that the model lacks, and for a model without hard experts.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, MoELayer) and layer.hard_MK.shape[1]]
    if not layers:
        raise ConfigError("the model has no modality experts to exchange: no group of model.experts.groups is of kind "
                          "modality, or model.moe is dense")  # fmt: skip
    kept = [layer.hard_MK for layer in layers]
    places = [_rows(layer, experts_of) for layer in layers]
    try:
        for layer, place_M in zip(layers, places, strict=True):
            layer.hard_MK = layer.hard_MK[place_M]
        yield
    finally:
        for layer, hard_MK in zip(layers, kept, strict=True):
            layer.hard_MK = hard_MK


def _rows(layer: MoELayer, experts_of: Mapping[str, str]) -> torch.Tensor:
    """(M,) int64: the row whose hard experts each row gets."""
    rows = layer.map.rows
    for name in [name for pair in experts_of.items() for name in pair if name not in layer.map.modalities]:
        raise ConfigError(f"no modality {name!r} in this model; it has {', '.join(layer.map.modalities)}")
    places = [rows.index((experts_of.get(modality, modality), task)) for modality, task in rows]
    return torch.tensor(places, device=layer.hard_MK.device)
