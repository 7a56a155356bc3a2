"""Tokens of a sample as they are told from stored lengths, against what the model makes of it."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moemm.data.dataset import SplitDataset
from moemm.data.deal import UNIT, Lengths
from moemm.data.loader import train_loader
from moemm.distributed import World
from moemm.modalities import prepare_functions
from moemm.testing.tiny import tiny_config
from moemm.train.lengths import even_length, measured_deal, token_counts
from moemm.train.setup import prepare, seeded_model

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("sections", [{}, {"missing": {"kind": "bank"}}], ids=["plain", "stand-ins"])
def test_tokens_are_those_of_the_stream(tiny_data: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    loaded = tiny_config(tiny_data, train={"output": str(tmp_path / "run"), "batch_size": 24}, model=sections)
    setup, _ = prepare(loaded, resume=False)
    model = seeded_model(setup, torch.device("cpu"))
    before = torch.random.get_rng_state()
    counts = token_counts(model, setup.catalogue, prepare_functions(setup.specs))
    assert torch.equal(torch.random.get_rng_state(), before) and model.training
    datasets = [SplitDataset(setup.catalogue, task=task.name, split="train") for task in setup.catalogue.tasks]
    lengths = [Lengths(dataset, counts, {}) for dataset in datasets]
    with train_loader(setup.catalogue, setup.config, prepare=prepare_functions(setup.specs)) as loader:
        for batch in islice(loader, 3):
            stream = model.eval().tokenize(batch)
            true = torch.bincount(stream.sample_T, minlength=batch.num_samples).numpy()
            told = []
            for task, index in zip(batch.task.tolist(), batch.index.tolist(), strict=True):
                item = int(np.flatnonzero(datasets[task].indices == index)[0])
                told.append(lengths[task].tokens(item, None) / UNIT)
            np.testing.assert_allclose(told, true, atol=1.01)
            assert len(set(true.tolist())) > 2, "lengths must differ to mean anything"


def test_one_rank_and_samples_ask_for_no_deal(tiny_data: Path, tmp_path: Path) -> None:
    for deal, ranks in (("samples", 2), ("tokens", 1)):
        loaded = tiny_config(tiny_data, train={"output": str(tmp_path / deal)}, data={"deal": deal})
        setup, _ = prepare(loaded, resume=False)
        model = seeded_model(setup, torch.device("cpu"))
        assert measured_deal(model, setup, {}, World(size=ranks)) is None
    assert even_length(64) == 384
