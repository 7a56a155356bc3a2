"""Saves, signals and going on: a few of the cases of benchmarks/faults/saves.py, which `make soak` tries all of."""

from __future__ import annotations

import pytest

from benchmarks.faults import saves
from benchmarks.faults.saves import Runs
from moemm.testing.forked import Nursery


@pytest.fixture(scope="module")
def runs(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(nursery, tmp_path_factory.mktemp("saves"), steps=10)


def test_kill_in_a_save(runs: Runs) -> None:
    assert len(saves.KILLS) == 120
    assert saves.kill_in_save(runs, 2).wrong == []


def test_disk_full(runs: Runs) -> None:
    assert saves.full_disk(runs, 1).wrong == []


def test_signals(runs: Runs) -> None:
    kind, target = saves.SIGNALS[0]
    assert saves.signalled(runs, kind, target, 2) == ""


def test_broken_files_of_a_checkpoint_of_two_ranks(runs: Runs) -> None:
    assert saves.damage(runs, 60).wrong == []


@pytest.mark.soak
@pytest.mark.parametrize("row", ["kill_at_random", "go_on"])
def test_the_other_rows(runs: Runs, row: str) -> None:
    outcome = getattr(saves, row)(Runs(runs.nursery, runs.folder / row), 8)
    assert outcome.wrong == []
