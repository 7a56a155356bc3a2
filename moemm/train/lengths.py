"""How many tokens a value becomes, measured on a few of them: so every kind of modality is known, also a user's own."""

from __future__ import annotations

import numpy as np
import torch

from moemm.checkpoint import random_state
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.data.dataset import SplitDataset
from moemm.data.deal import UNIT, Dealt, TokenCount, is_text, lengths_of
from moemm.data.pack import Packer
from moemm.data.sample import Prepare
from moemm.distributed import World, on_main
from moemm.models import Model
from moemm.train.setup import Setup

VALUES = 24
"""Values of each modality that are tokenized, from the shortest to the longest."""
TEXTS = 50_000
"""Texts of a modality, up to which each is turned into ids once at the start, in a second or two; of more than these
their number is told from the bytes."""


def measured_deal(model: Model, setup: Setup, prepare: Prepare, world: World) -> Dealt | None:
    """How to deal micro-batches so that ranks have about as much to compute; None for one rank or `data.deal: samples`.

    Rank 0 measures for all of them: they must agree to the bit.
    """
    if setup.config.data.deal == "samples" or world.size == 1:
        return None
    counts = on_main(lambda: token_counts(model, setup.catalogue, prepare))
    return Dealt(counts, even=even_length(setup.config.model.dim))


def even_length(dim: int) -> int:
    """Tokens of a sample whose attention costs as much as all else of a block of width `dim`.

    Of a token, products with weights take 24 dim^2 operations where the feed-forward part is four times as wide, and
    attention to t tokens takes 4 t dim.
    """
    return 6 * dim


def token_counts(model: Model, catalogue: Catalogue, prepare: Prepare) -> dict[str, TokenCount]:
    """Of each modality, from what the model makes of some values of the train splits. Changes no random state."""
    names = [info.name for info in catalogue.modalities]
    training = model.training
    with torch.no_grad(), random_state.preserved():
        model.eval()
        measured = {name: _measure(model, catalogue, prepare, name) for name in names}
        model.train(training)
    found = {}
    for number, name in enumerate(names):
        lengths, counts_BM, prepared = measured[name]
        others = [other for other in names if other != name]
        absent = measured[others[0]][1][:, number].mean() if others else 0.0
        line = _line(lengths, counts_BM[:, number])
        fixed, each, lacking = (round(UNIT * value) for value in (*line, absent))
        found[name] = TokenCount(fixed, each, lacking, prepared)
    return found


def _measure(model: Model, catalogue: Catalogue, prepare: Prepare, name: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """(B,) lengths of some values of a modality, (B, M) tokens of each modality of samples of it alone, and of what the
    lengths are: see TokenCount.
    """  # fmt: skip
    datasets = [_alone(catalogue, task, name) for task in catalogue.tasks if name in task.modalities]
    few = sum(len(dataset) for dataset in datasets) <= TEXTS
    filled = [np.flatnonzero(dataset.present()) for dataset in datasets]
    dataset, items = next((one, found) for one, found in zip(datasets, filled, strict=True) if found.size)
    prepared = few and name in prepare and is_text(dataset, name)
    ranked = items[np.argsort(lengths_of(dataset, name, {}, items), kind="stable")]
    chosen = ranked[np.unique(np.linspace(0, len(ranked) - 1, VALUES).round().astype(np.int64))]
    device = next(model.parameters()).device
    stream = model.tokenize(Packer(catalogue, prepare)([dataset[item] for item in chosen.tolist()]).to(device))
    place_T = stream.sample_T * len(catalogue.modalities) + stream.modality_T
    counts = torch.bincount(place_T, minlength=len(chosen) * len(catalogue.modalities))
    lengths = lengths_of(dataset, name, prepare if prepared else {}, chosen)
    return lengths, counts.view(len(chosen), -1).cpu().numpy(), prepared


def _alone(catalogue: Catalogue, task: TaskInfo, name: str) -> SplitDataset:
    """The train split of a task with one of its modalities alone."""
    others = [other for other in task.modalities if other != name]
    return SplitDataset(catalogue, task=task.name, split="train", drop=others)


def _line(lengths: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """The line through (length, tokens) by least squares; level where all lengths are equal."""
    spread = lengths - lengths.mean()
    square = float((spread**2).sum())
    each = float((spread * (tokens - tokens.mean())).sum()) / square if square else 0.0
    return float(tokens.mean() - each * lengths.mean()), each
