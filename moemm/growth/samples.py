"""Samples of a run's training mixture, to measure on: the same for the same configuration."""

from __future__ import annotations

import itertools
from dataclasses import replace

from moemm.data import train_loader
from moemm.data.sample import PackedBatch
from moemm.modalities import prepare_functions
from moemm.train import Run


def training_batches(run: Run, number: int, *, size: int) -> list[PackedBatch]:
    """The first `number` samples of the mixture, with all their modalities, in batches of `size`; the last is whole."""
    config = run.config
    data = replace(
        config.data, num_workers=0, modality_dropout=0.0, modality_dropout_start=None, modality_dropout_over=None
    )
    plan = replace(config, data=data, train=replace(config.train, batch_size=size, accumulation=1))
    with train_loader(run.catalogue, plan, prepare=prepare_functions(run.specs)) as loader:
        return list(itertools.islice(loader, -(-number // size)))
