"""Samples of a run's training mixture, to measure on: the same for the same configuration."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

from moemm.config import Config
from moemm.data import train_loader
from moemm.data.catalogue import Catalogue
from moemm.data.sample import PackedBatch
from moemm.modalities import ModalitySpec, prepare_functions
from moemm.train import Run


def training_batches(run: Run, number: int, *, size: int) -> list[PackedBatch]:
    """The first `number` samples of the mixture, with all their modalities, in batches of `size`; the last is whole."""
    return mixture_batches(run.config, run.catalogue, run.specs, number, size=size)


def mixture_batches(
    config: Config, catalogue: Catalogue, specs: Mapping[str, ModalitySpec], number: int, *, size: int
) -> list[PackedBatch]:
    """The same of a model that need not have been trained."""
    data = replace(
        config.data, num_workers=0, modality_dropout=0.0, modality_dropout_start=None, modality_dropout_over=None
    )
    plan = replace(config, data=data, train=replace(config.train, batch_size=size, accumulation=1))
    with train_loader(catalogue, plan, prepare=prepare_functions(specs)) as loader:
        return list(itertools.islice(loader, -(-number // size)))
