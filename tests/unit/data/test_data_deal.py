"""Micro-batches dealt over ranks: the same samples whatever the number of ranks, and about as many tokens on each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moemm.config import LoadedConfig, load_config
from moemm.data import PackedBatch, train_loader
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.data.deal import UNIT, Dealt, TokenCount, cost, deal
from moemm.data.shared import held_open

QUICKSTART = Path(__file__).parents[3] / "data" / "quickstart"
COSTS = st.lists(st.integers(1, 10**6), min_size=8, max_size=40)


@pytest.fixture(autouse=True)
def kept_open() -> Iterator[None]:
    with held_open():
        yield


@settings(max_examples=150, deadline=None)
@given(COSTS, st.sampled_from([1, 2, 3, 8]))
def test_every_sample_goes_to_one_rank_and_none_gets_far_more(costs: list[int], ranks: int) -> None:
    shares = deal(costs, ranks)
    assert sorted(position for share in shares for position in share) == list(range(len(costs)))
    assert all(share and share == sorted(share) for share in shares)
    sums = [sum(costs[position] for position in share) for share in shares]
    # The last that the fullest rank got went to the least full one: no more than its own size above the mean.
    assert max(sums) <= sum(costs) / ranks + max(costs)
    assert max(sums) <= 4 / 3 * max(sum(costs) / ranks, *costs, sum(sorted(costs)[-ranks - 1 :][:2]))


def test_equal_samples_are_dealt_evenly() -> None:
    assert deal([5] * 8, 4) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert deal([9, 1, 1, 1, 1, 5], 2) == [[0], [1, 2, 3, 4, 5]]


def test_long_samples_cost_more_than_their_tokens() -> None:
    assert cost(100 * UNIT, even=400) == 125 * UNIT
    assert cost(400 * UNIT, even=400) == 800 * UNIT
    assert cost(0, even=400) == 0


def recipe(tmp_path: Path, **train: Any) -> LoadedConfig:
    text = f"""
name: joint
data:
  root: {QUICKSTART}
  joint_labels: true
  num_workers: 0
  modality_dropout: 0.6
  modality_dropout_start: 0.3
  tasks:
    - {{name: digit, file: avclip.h5}}
    - {{name: motion, file: avclip.h5, label: label_motion}}
    - {{name: vowels, file: vowels.h5}}
    - {{name: reviews, file: reviews.h5}}
train: {{steps: 4, batch_size: 32}}
"""
    (tmp_path / "joint.yaml").write_text(text)
    return load_config(tmp_path / "joint.yaml", [f"train.{key}={value}" for key, value in train.items()])


COUNTS = TokenCount(fixed=0, each=UNIT), TokenCount(fixed=40 * UNIT, each=0, absent=3 * UNIT)


def dealt(catalogue: Catalogue) -> Dealt:
    """Ragged modalities by length, the others 40 tokens."""
    return Dealt({info.name: COUNTS[0 if info.ragged else 1] for info in catalogue.modalities}, even=384)


def batches(
    loaded: LoadedConfig, catalogue: Catalogue, count: int, *, rank: int, ranks: int, by: Dealt | None
) -> list[PackedBatch]:
    loader = train_loader(
        catalogue, loaded.config, rank=rank, world_size=ranks, start_step=1, total_steps=4, dealt=by
    )  # fmt: skip
    with loader:
        return list(islice(loader, count))


def samples(batch: PackedBatch) -> list[tuple[Any, ...]]:
    """Task, place, modalities and values of each sample of a batch."""
    found = []
    for row in range(batch.num_samples):
        values = []
        for packed in batch.modalities.values():
            for place in np.flatnonzero(packed.sample.numpy() == row):
                if packed.lengths is None:
                    values.append(tuple(one[place].numpy().tobytes() for one in packed.fields.values()))
                else:
                    start = int(packed.lengths[:place].sum())
                    length = int(packed.lengths[place])
                    values.append(
                        tuple(one[start : start + length].numpy().tobytes() for one in packed.fields.values())
                    )
        found.append((int(batch.task[row]), int(batch.index[row]), tuple(batch.presence[row].tolist()), tuple(values)))
    return found


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_any_number_of_ranks_reads_the_same_samples(tmp_path: Path, by_tokens: bool, accumulation: int) -> None:
    loaded = recipe(tmp_path, accumulation=accumulation)
    catalogue = build_catalogue(loaded.config.data, base=tmp_path)
    by, count = dealt(catalogue) if by_tokens else None, 2 * accumulation
    (whole,) = [batches(loaded, catalogue, count, rank=0, ranks=1, by=by)]
    assert len({one[2] for batch in whole for one in samples(batch)}) > 5, "modalities must go to mean anything"
    for ranks in (2, 4, 8):
        parts = [batches(loaded, catalogue, count, rank=rank, ranks=ranks, by=by) for rank in range(ranks)]
        for micro, batch in enumerate(whole):
            together = [one for part in parts for one in samples(part[micro])]
            assert sorted(together) == sorted(samples(batch))
            targets = {task: sum(len(part[micro].targets[task]) for part in parts) for task in batch.targets}
            assert targets == {task: len(target) for task, target in batch.targets.items()}
        uneven = {part[micro].num_samples for part in parts for micro in range(count)}
        assert (len(uneven) > 1) == by_tokens


def test_the_deal_knows_what_will_be_taken_away(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, batch_size=32)
    catalogue = build_catalogue(loaded.config.data, base=tmp_path)
    by = Dealt({info.name: TokenCount(fixed=UNIT, each=0) for info in catalogue.modalities}, even=10**9)
    parts = [batches(loaded, catalogue, 2, rank=rank, ranks=2, by=by) for rank in range(2)]
    for step in range(2):  # each modality that is left counts 1: levels differ by 1 at most where samples have several
        left = [int(part[step].presence.sum()) for part in parts]
        assert abs(left[0] - left[1]) <= 1
