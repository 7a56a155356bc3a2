"""Ranks that die or hang: a few of the cases of benchmarks/faults/ranks.py, which `make soak` tries all of."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.faults import ranks
from moemm.distributed import World, places
from moemm.distributed.places import Board, lost, on_board
from moemm.errors import DataError, LaunchError
from moemm.points import point
from moemm.testing.forked import Nursery


def test_a_rank_that_is_killed_is_named_with_its_phase(nursery: Nursery, tmp_path: Path) -> None:
    assert ranks.kill_in_phase(nursery, tmp_path, 1).wrong == []


def test_a_rank_that_dies_or_hangs_ends_the_job_in_time(nursery: Nursery, tmp_path: Path) -> None:
    assert ranks.die(nursery, tmp_path, 1, of=[("stop", "step")]).wrong == []


@pytest.fixture
def boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Board]:
    """Two ranks in one process, on one host."""
    monkeypatch.setattr(places, "gather_objects", lambda value: [value, value])
    monkeypatch.setattr(places, "_WATCHED_S", 0.05)
    monkeypatch.setattr(places, "BEAT_S", 0.01)
    return [Board(tmp_path / "ranks", World(rank=rank, size=2)) for rank in (0, 1)]


def test_a_board_tells_a_rank_that_is_behind(boards: list[Board]) -> None:
    point("backward", step=7)
    boards[1](places.place())
    point("step")
    boards[0](places.place())
    text = boards[0].report(RuntimeError("gloo: Timed out\nmore"))
    assert text.startswith("Rank 1 hangs (it lives, but does not go on); last seen in backward of step 7")
    assert "rank 0 waited in step of step 7" in text and "gloo: Timed out\n  to do:" in text and "--resume" in text
    for board in boards:
        board.close(remove=True)


def test_a_board_tells_a_rank_that_said_how_it_ended_from_one_that_waited(
    boards: list[Board], monkeypatch: pytest.MonkeyPatch
) -> None:
    boards[1].end("ValueError: no\nsecond line")
    assert boards[0].report(RuntimeError()).startswith("Rank 1 ended (ValueError: no); last seen in")
    boards[1].end("lost Rank 0 ...")
    assert boards[0].report(RuntimeError()).startswith("A rank did not come to a collective")
    boards[1].end("")
    boards[1].close(remove=False)
    monkeypatch.setattr(Board, "_process", lambda self, rank, pid: "?")  # on another host
    assert "Rank 1 hangs, or its host is gone (no sign of life)" in boards[0].report(RuntimeError())
    monkeypatch.setattr(Board, "_process", lambda self, rank, pid: "T")
    assert "Rank 1 hangs (its process is stopped)" in boards[0].report(RuntimeError())
    monkeypatch.setattr(Board, "_process", lambda self, rank, pid: "")
    assert "Rank 1 is gone" in boards[0].report(RuntimeError())
    boards[0].close(remove=True)
    assert os.listdir(boards[0]._folder) == ["00001"]


def test_only_errors_of_collectives_are_taken_for_a_lost_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost(RuntimeError("[...gloo/transport/tcp/pair.cc:553] Connection closed by peer"))
    assert not lost(RuntimeError("shapes cannot be multiplied")) and not lost(DataError("gloo"))
    monkeypatch.setattr(places, "gather_objects", lambda value: [value, value])
    monkeypatch.setattr(places, "_WATCHED_S", 0.01)
    world = World(rank=0, size=2)
    with pytest.raises(ValueError, match="mine"), on_board(tmp_path, world):
        raise ValueError("mine")
    assert b"ValueError: mine" in (tmp_path / "ranks" / "00000").read_bytes()
    with pytest.raises(LaunchError, match="to do:"), on_board(tmp_path, world):
        raise RuntimeError("NCCL timeout")
    with on_board(tmp_path, world):
        pass
    assert not list((tmp_path / "ranks").iterdir())
    with on_board(tmp_path / "none", World()):
        assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_costs_only_the_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "gather_objects", lambda value: [value, value])
    (tmp_path / "ranks").write_text("a file, not a folder")
    with on_board(tmp_path, World(rank=0, size=2)):
        point("data", step=1)
        assert places.place().name == "data"
    assert (tmp_path / "ranks").read_text() == "a file, not a folder"


def test_a_point_on_the_board_costs_microseconds(boards: list[Board]) -> None:
    began = time.perf_counter()
    for _ in range(2000):
        boards[0](places.place())
    assert (time.perf_counter() - began) / 2000 < 1e-4
    for board in boards:
        board.close(remove=True)
