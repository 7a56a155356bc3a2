from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from moemm.config.schema import Config, DataConfig, TaskConfig, TrainConfig
from moemm.data import Catalogue, PackedBatch, build_catalogue, eval_loader, train_loader
from moemm.data.loader import Dropout
from moemm.errors import ConfigError, DataError


def config(**options: Any) -> Config:
    tasks = [TaskConfig(name="a", file="good.h5"), TaskConfig(name="b", file="good.h5", modalities=["accel", "record"])]
    train = {key: options.pop(key) for key in ("batch_size", "accumulation") if key in options}
    return Config(
        data=DataConfig(**{"tasks": tasks, "num_workers": 0, **options}),
        train=TrainConfig(**{"batch_size": 8, **train}),
    )


@pytest.fixture
def catalogue(make_file: Any, tmp_path: Path) -> Catalogue:
    make_file()
    return build_catalogue(config().data, base=tmp_path)


def signature(batch: PackedBatch) -> list[Any]:
    found: list[Any] = []
    batch.map(lambda tensor: found.append((tuple(tensor.shape), tensor.numpy().tobytes())) or tensor)  # type: ignore[func-returns-value]
    return found


def take(catalogue: Catalogue, count: int, *, settings: Config | None = None, **options: Any) -> list[PackedBatch]:
    with train_loader(catalogue, settings or config(), **options) as loader:
        return list(islice(loader, count))


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert multiprocessing.active_children() == []


def test_the_number_of_workers_changes_nothing(catalogue: Catalogue) -> None:
    runs = [take(catalogue, 9, settings=config(num_workers=n, modality_dropout=0.5)) for n in (0, 1, 2)]
    signatures = [[signature(batch) for batch in run] for run in runs]
    assert signatures[0] == signatures[1] == signatures[2]


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_share_the_global_batch(catalogue: Catalogue, world: int, accumulation: int) -> None:
    whole = take(catalogue, 3, settings=config(modality_dropout=0.3))
    shared = config(modality_dropout=0.3, accumulation=accumulation)
    ranks = [take(catalogue, 3 * accumulation, settings=shared, rank=r, world_size=world) for r in range(world)]
    for step, batch in enumerate(whole):
        micro = range(step * accumulation, (step + 1) * accumulation)
        parts = [ranks[rank][position] for position in micro for rank in range(world)]
        assert torch.equal(torch.cat([part.index for part in parts]), batch.index)
        assert torch.equal(torch.cat([part.presence for part in parts]), batch.presence)


@pytest.mark.parametrize("step", [1, 4, 7])
def test_resuming_gives_the_batches_that_would_have_come(catalogue: Catalogue, step: int) -> None:
    settings = config(modality_dropout=0.3, accumulation=2)
    going_on = take(catalogue, 2 * step + 4, settings=settings)[2 * step :]
    resumed = take(catalogue, 4, settings=settings, start_step=step)
    assert [signature(batch) for batch in going_on] == [signature(batch) for batch in resumed]


def test_dropout_takes_modalities_but_never_the_last(catalogue: Catalogue) -> None:
    settings = config(modality_dropout=0.9, batch_size=24)
    batches = take(catalogue, 6, settings=settings)
    presence = torch.cat([batch.presence for batch in batches])
    assert presence.any(dim=1).all()
    assert presence.sum(dim=1).float().mean() < 1.6
    full = take(catalogue, 6, settings=config(batch_size=24))
    assert torch.cat([batch.presence for batch in full]).sum() > 2 * presence.sum()


def test_dropout_moves_from_its_start_to_its_end(catalogue: Catalogue) -> None:
    settings = config(modality_dropout=0.6, modality_dropout_start=0.2, modality_dropout_over=0.5)
    dropout = Dropout.of(settings, total_steps=40)
    chances = [dropout.at(step * 8) for step in (0, 5, 10, 20, 39, 100)]
    assert chances == pytest.approx([0.2, 0.3, 0.4, 0.6, 0.6, 0.6])
    assert Dropout.of(config(modality_dropout=0.3), total_steps=None).at(77) == 0.3
    assert dropout.at(3) != dropout.at(4), "by draw, so that micro-batches and ranks do not matter"
    with pytest.raises(AssertionError, match="a schedule needs the number of steps"):
        Dropout.of(settings, total_steps=None)


def test_a_schedule_of_the_dropout_is_the_same_after_a_resume_and_on_ranks(catalogue: Catalogue) -> None:
    settings = config(modality_dropout=0.0, modality_dropout_start=0.9, modality_dropout_over=0.5)
    whole = take(catalogue, 8, settings=settings, total_steps=8)
    complete = take(catalogue, 8)
    lost = [int((full.presence & ~one.presence).sum()) for one, full in zip(whole, complete, strict=True)]
    assert lost[0] > lost[3] and lost[4:] == [0] * 4, "nothing is taken away from the middle on"
    resumed = take(catalogue, 5, settings=settings, total_steps=8, start_step=3)
    assert [signature(batch) for batch in resumed] == [signature(batch) for batch in whole[3:]]
    halves = [take(catalogue, 4, settings=settings, total_steps=8, rank=r, world_size=2) for r in range(2)]
    for number, batch in enumerate(whole[:4]):
        assert torch.equal(torch.cat([half[number].presence for half in halves]), batch.presence)


def test_prepare_runs_in_the_worker(catalogue: Catalogue) -> None:
    prepare = {"text": lambda _: np.array([os.getpid()])}
    batch = take(catalogue, 1, settings=config(num_workers=1), prepare=prepare)[0]
    pids = set(batch.modalities["text"].fields["data"].tolist())
    assert len(pids) == 1 and os.getpid() not in pids


def test_the_global_random_state_stays(catalogue: Catalogue) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(catalogue, 2, settings=config(num_workers=1))
    list(eval_loader(catalogue, task="a", split="val", batch_size=4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_sample_arrives_as_its_own_message(make_file: Any, tmp_path: Path, num_workers: int) -> None:
    path = make_file()
    with h5py.File(path, "r+") as file:
        file["modalities/record/cat"][:] = 9
    catalogue = build_catalogue(config().data, base=tmp_path)
    with pytest.raises(DataError) as error:
        take(catalogue, 2, settings=config(num_workers=num_workers))
    assert str(error.value).startswith(str(path)) and "category 9" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_other_errors_of_workers_are_not_hidden(catalogue: Catalogue) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("a bug in prepare")

    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match="a bug in prepare"):
            take(catalogue, 1, settings=config(num_workers=num_workers), prepare={"text": fail})


def test_a_killed_worker_is_an_error_that_says_so(catalogue: Catalogue) -> None:
    with (
        train_loader(catalogue, config(num_workers=1)) as loader,
        pytest.raises((DataError, RuntimeError), match=r"[Ww]orker"),
    ):
        for _ in range(200):
            next(loader)
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)


def test_workers_leave_signals_to_the_trainer(catalogue: Catalogue) -> None:
    with train_loader(catalogue, config(num_workers=1)) as loader:
        next(loader)
        (child,) = multiprocessing.active_children()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(child.pid or 0, number)
        assert len([next(loader) for _ in range(20)]) == 20
        assert child.is_alive()
    assert not child.is_alive()


def test_evaluation_sees_each_sample_once(catalogue: Catalogue) -> None:
    for world in (1, 2, 3):
        ranks = [
            list(eval_loader(catalogue, task="a", split="val", batch_size=2, rank=rank, world_size=world))
            for rank in range(world)
        ]
        assert len({len(batches) for batches in ranks}) == 1
        seen = sorted(index for batches in ranks for batch in batches for index in batch.index.tolist())
        assert seen == list(range(12, 18))


def test_evaluation_with_modalities_taken_away(make_file: Any, tmp_path: Path) -> None:
    make_file()
    tasks = [TaskConfig(name="a", file="good.h5", modalities=["image", "text"])]
    catalogue = build_catalogue(DataConfig(tasks=tasks), base=tmp_path)
    loader = eval_loader(catalogue, task="a", split="train", batch_size=5, drop=["image"])
    batches = list(loader)
    assert loader.num_skipped == 1  # sample 3 has no text
    assert sum(batch.num_samples for batch in batches) == 11
    assert not any(len(batch.modalities["image"]) for batch in batches)
    loader = eval_loader(catalogue, task="a", split="train", batch_size=5, drop=["image", "text"])
    assert (list(loader), loader.num_skipped) == ([], 12)
    with pytest.raises(ConfigError, match="no modality 'audio'; it has image, text"):
        eval_loader(catalogue, task="a", split="train", batch_size=5, drop=["audio"])
    with pytest.raises(DataError, match="no sample of split ood"):
        eval_loader(catalogue, task="a", split="ood", batch_size=5)
