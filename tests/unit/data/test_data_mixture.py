from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moemm.data.mixture import MixtureSampler
from moemm.errors import ConfigError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=5)
TEMPERATURE = st.sampled_from([1.0, 1.5, 2.0, 5.0, 100.0])
QUICK = settings(max_examples=60, deadline=None)


def sampler(sizes: list[int], **options: Any) -> MixtureSampler:
    return MixtureSampler(sizes, **{"batch_size": 4, **options})


@QUICK
@given(SIZES, TEMPERATURE, st.integers(-5, 2**40))
def test_epochs_hold_fixed_numbers_of_each_task(sizes: list[int], temperature: float, seed: int) -> None:
    mixture = sampler(sizes, temperature=temperature, seed=seed)
    total = mixture.samples_per_epoch
    assert total == sum(sizes) == sum(mixture.counts)
    assert temperature > 1 or mixture.counts == tuple(sizes)
    for epoch in range(3):
        drawn = Counter(draw.task for draw in mixture.draws(epoch * total, (epoch + 1) * total))
        assert tuple(drawn[task] for task in range(len(sizes))) == mixture.counts


@QUICK
@given(SIZES, TEMPERATURE, st.integers(0, 9))
def test_no_sample_comes_twice_before_all_came_once(sizes: list[int], temperature: float, seed: int) -> None:
    mixture = sampler(sizes, temperature=temperature, seed=seed)
    per_task: list[list[int]] = [[] for _ in sizes]
    for epoch in range(4):  # within an epoch tasks are mixed, so their order shows from one epoch to the next
        for draw in mixture.draws(epoch * sum(sizes), (epoch + 1) * sum(sizes)):
            per_task[draw.task].append(draw.item)
        for task, items in enumerate(per_task):
            times = Counter(items)
            assert set(times) <= set(range(sizes[task]))
            assert max(times.values()) - (min(times.values()) if len(times) == sizes[task] else 0) <= 1


@QUICK
@given(SIZES, st.integers(0, 30), st.sampled_from([(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 3)]), st.integers(1, 3))
def test_the_global_batch_does_not_depend_on_the_world(
    sizes: list[int], step: int, shape: tuple[int, int], per_micro: int
) -> None:
    world, accumulation = shape
    size = world * accumulation * per_micro
    alone = sampler(sizes, batch_size=size, seed=3)
    shared = sampler(sizes, batch_size=size, seed=3, world_size=world, accumulation=accumulation)
    parts = [shared.batch(step, micro, rank) for micro in range(accumulation) for rank in range(world)]
    assert {len(part) for part in parts} == {per_micro}
    assert [draw for part in parts for draw in part] == alone.batch(step)
    one_rank = sampler(sizes, batch_size=size, seed=3, accumulation=accumulation)
    for micro in range(accumulation):
        together = [draw for rank in range(world) for draw in shared.batch(step, micro, rank)]
        assert together == one_rank.batch(step, micro), "a micro-batch of all ranks is that of one rank"


@QUICK
@given(SIZES, st.integers(0, 50), st.integers(1, 3), st.integers(1, 2))
def test_starting_at_any_step_is_going_on(sizes: list[int], step: int, accumulation: int, world: int) -> None:
    options = {"batch_size": 6 * world, "accumulation": accumulation, "world_size": world, "rank": world - 1, "seed": 1}
    from_start = islice(sampler(sizes, **options), step * accumulation, (step + 5) * accumulation)
    from_step = islice(sampler(sizes, **options, start_step=step), 5 * accumulation)
    assert list(from_start) == list(from_step)


@QUICK
@given(SIZES, st.integers(0, 300), st.integers(1, 90))
def test_draws_are_numbered_and_pure(sizes: list[int], start: int, length: int) -> None:
    used = sampler(sizes)
    used.draws(0, 500)
    draws = used.draws(start, start + length)
    assert [draw.number for draw in draws] == list(range(start, start + length))
    assert draws == sampler(sizes).draws(start, start + length)


def test_seeds_epochs_and_tasks_differ() -> None:
    first, second = sampler([50, 50], seed=0), sampler([50, 50], seed=1)
    assert first.draws(0, 100) != second.draws(0, 100)
    epochs = [[draw[:2] for draw in first.draws(start, start + 100)] for start in (0, 100)]
    assert epochs[0] != epochs[1]
    by_task = [[item for task, item, _ in first.draws(0, 100) if task == number] for number in (0, 1)]
    assert by_task[0] != by_task[1]


def test_large_temperature_is_uniform() -> None:
    assert sampler([1000, 10, 10], temperature=1e9).counts == (340, 340, 340)


@pytest.mark.parametrize(("batch_size", "world", "accumulation"), [(6, 4, 1), (6, 1, 4), (0, 1, 1)])
def test_an_uneven_batch_is_refused(batch_size: int, world: int, accumulation: int) -> None:
    with pytest.raises(ConfigError, match="use a multiple of"):
        sampler([5], batch_size=batch_size, world_size=world, accumulation=accumulation)


def test_an_empty_task_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs training samples"):
        sampler([5, 0])
