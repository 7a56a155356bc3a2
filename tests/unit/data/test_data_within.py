"""Batches within labels: `data.within`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from moemm.data import train_loader
from moemm.data.build import build_catalogue
from moemm.data.mixture import MixtureSampler
from moemm.data.within import read_within, write_within
from moemm.errors import DataError
from moemm.testing.tiny import tiny_config

SIZES, BATCH = (50, 30), 8


def labels(kinds: int) -> list[np.ndarray]:
    return [np.arange(size, dtype=np.int64) % kinds for size in SIZES]


@pytest.mark.parametrize("batch", [8, 7, 80, 100])
@pytest.mark.parametrize("kinds", [1, 3, 80])
def test_an_epoch_draws_what_it_would_without(batch: int, kinds: int) -> None:
    own = labels(kinds)
    plain = MixtureSampler(SIZES, batch_size=batch, seed=4)
    within = MixtureSampler(SIZES, batch_size=batch, seed=4, labels=own)
    for epoch in range(3):
        start = epoch * sum(SIZES)
        one, other = (sampler.draws(start, start + sum(SIZES)) for sampler in (plain, within))
        assert Counter((d.task, d.item) for d in one) == Counter((d.task, d.item) for d in other)
        assert [d.number for d in other] == list(range(start, start + sum(SIZES)))


def test_batches_hold_one_label_but_where_one_ends() -> None:
    own = labels(3)
    sampler = MixtureSampler(SIZES, batch_size=BATCH, seed=1, labels=own)
    per_epoch = sum(SIZES) / BATCH
    found = [{int(own[d.task][d.item]) for d in sampler.batch(step)} for step in range(int(4 * per_epoch))]
    mixed = sum(len(one) > 1 for one in found)
    assert mixed <= 4 * 3, "at most one for the end of each label, and of the epoch"
    plain = MixtureSampler(SIZES, batch_size=BATCH, seed=1)
    assert sum(len({int(own[d.task][d.item]) for d in plain.batch(step)}) > 1 for step in range(40)) > 35
    order = [next(iter(one)) for one in found if len(one) == 1]
    assert len(set(order[:10])) > 1, "labels take turns"


def test_the_batch_is_the_same_on_any_number_of_ranks() -> None:
    own = labels(4)
    one = MixtureSampler(SIZES, batch_size=BATCH, seed=1, labels=own)
    two = [MixtureSampler(SIZES, batch_size=BATCH, seed=1, labels=own, rank=r, world_size=2) for r in (0, 1)]
    for step in (0, 9, 10, 33):
        assert one.batch(step) == [draw for rank in two for draw in rank.batch(step)]


def test_the_loader_reads_them(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path)
    catalogue = build_catalogue(loaded.config.data, base=tmp_path)
    file = tmp_path / "labels.safetensors"
    write_within(file, {"shapes": np.zeros(48, np.int64), "tones": np.ones(48, np.int64)})
    config = replace(loaded.config, data=replace(loaded.config.data, within=str(file)))
    with train_loader(catalogue, config) as loader:
        tasks = [set(next(loader).task.tolist()) for _ in range(12)]
    assert all(len(one) == 1 for one in tasks) and {0} in tasks and {1} in tasks


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"shapes": np.zeros(48, np.int64)}, "has nothing for task tones"),
        ({"shapes": np.zeros(47, np.int64), "tones": np.zeros(48, np.int64)}, "a label for each of its 48"),
        ({"shapes": np.zeros(48, np.float32), "tones": np.zeros(48, np.int64)}, "has float32"),
        (None, "is no file of labels"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused(values: dict[str, np.ndarray] | None, problem: str, tmp_path: Path) -> None:
    catalogue = build_catalogue(tiny_config(tmp_path).config.data, base=tmp_path)
    file = tmp_path / "labels.safetensors"
    if values is None:
        file.write_bytes(b"nothing")
    else:
        save_file(values, file)
    with pytest.raises(DataError, match=problem):
        read_within(file, catalogue, catalogue.groups)
    with pytest.raises(DataError, match="no such file of labels"):
        read_within(tmp_path / "gone", catalogue, catalogue.groups)
