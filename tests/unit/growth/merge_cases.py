"""Runs to merge, written without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moemm.growth import Receipt, write_grown
from moemm.growth.grown import fresh_model, size_of
from moemm.testing.tiny import tiny_config
from moemm.train.setup import learn_modalities

Weights = dict[str, torch.Tensor]


def write_run(folder: Path, name: str, *, seed: int = 0, weights: Weights | None = None, **sections: Any) -> Path:
    """An untrained run of the tiny data in `folder`, with the weights that `seed` draws or those given."""
    loaded = tiny_config(folder, **sections)
    train = replace(loaded.config.train, output=str(folder / name), seed=seed)
    loaded = replace(loaded, config=replace(loaded.config, train=train))
    catalogue, specs = learn_modalities(loaded)
    model = fresh_model(loaded.config, catalogue, specs)
    if weights is not None:
        model.load_state_dict(weights)
    size = size_of(model)
    receipt = Receipt(
        operation="made", sources=[], target=str(folder / name), changed=[], proofs=[], before=size, after=size,
        optimizer="none",
    )  # fmt: skip
    return write_grown(loaded, catalogue, specs, model, receipt)


def weights_of(folder: Path) -> Weights:
    """The tensors of a run's only checkpoint."""
    (path,) = folder.glob("checkpoints/step_*/model.safetensors")
    return load_file(path)


def noisy(weights: Weights, scale: float, *, seed: int = 0) -> Weights:
    """The same with Gaussian noise on everything."""
    draw = torch.Generator().manual_seed(seed)
    return {name: value + scale * torch.randn(value.shape, generator=draw) for name, value in weights.items()}
