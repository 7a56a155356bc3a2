"""Files of fragments without an engine: what one cut wrote another reads, and nothing else."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moemm.checkpoint.fragments import Fragment
from moemm.checkpoint.state import MODEL, OPTIMIZER, HostMemory, RankState, Store, gather_state
from moemm.errors import CheckpointError

SHAPES = {"a": (3, 4), "b": (7,), "c": (), "trunk.0.w@2": (2, 5), "none": (0, 4)}
WEIGHTS = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
MOMENTS = {name: value * 0.5 for name, value in WEIGHTS.items()}


def cut(name: str, begin: int, end: int) -> Fragment:
    moments = {"exp_avg": MOMENTS[name].reshape(-1)[begin:end]} if end > begin else {}
    weight = WEIGHTS[name].reshape(-1)[begin:end]
    return Fragment(name, SHAPES[name], begin, weight, False, moments, torch.tensor(3.0) if moments else None)


def cuts(numbers: random.Random, ranks: int) -> list[list[Fragment]]:
    """Each tensor cut at random places, its parts dealt out to ranks."""
    dealt: list[list[Fragment]] = [[] for _ in range(ranks)]
    for name, value in WEIGHTS.items():
        inner = sorted({numbers.randrange(1, value.numel()) for _ in range(ranks - 1)}) if value.numel() > 1 else []
        edges = [0, *inner, value.numel()]
        for begin, end in pairwise(edges):
            dealt[numbers.randrange(ranks)].append(cut(name, begin, end))
    return dealt


def write(folder: Path, dealt: list[list[Fragment]]) -> list[str]:
    for rank, fragments in enumerate(dealt):
        alone = len(dealt) == 1
        gather_state(fragments, rank=rank, alone=alone, random={"r": torch.tensor(rank)}).write(folder)
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_is_read_by_any_other(tmp_path: Path, seed: int) -> None:
    numbers = random.Random(seed)
    files = write(tmp_path, cuts(numbers, numbers.randrange(1, 5)))
    weights, moments = (Store(tmp_path, files, kind) for kind in (MODEL, OPTIMIZER))
    assert set(weights.shapes) == set(SHAPES) and moments.steps == {name: 3.0 for name in SHAPES if name != "none"}
    for name, value in WEIGHTS.items():
        assert torch.equal(weights.whole(name), value) and weights.whole(name).shape == SHAPES[name]
    for fragments in cuts(numbers, 3):
        for one in fragments:
            assert weights.problem(one.name, one.shape, one.offset, one.length, floating=True) is None
            if one.length:
                assert torch.equal(weights.read(one.name, one.offset, one.length), one.weight)
                read = moments.read(f"exp_avg/{one.name}", one.offset, one.length)
                assert torch.equal(read, one.moments["exp_avg"])


def test_one_rank_writes_plain_tensors(tmp_path: Path) -> None:
    """Whoever opens it with safetensors finds names and shapes, and the same bytes each time."""
    files = write(tmp_path, [[cut(name, 0, value.numel()) for name, value in WEIGHTS.items()]])
    assert files == ["model.safetensors", "optimizer_00000.safetensors", "random_00000.safetensors"]
    found = load_file(tmp_path / files[0])
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in WEIGHTS.items()}
    with safe_open(tmp_path / files[0], framework="pt") as file:
        assert not file.metadata()
    before = [(tmp_path / name).read_bytes() for name in files]
    write(tmp_path, [[cut(name, 0, value.numel()) for name, value in WEIGHTS.items()]])
    assert [(tmp_path / name).read_bytes() for name in files] == before


def test_half_precision_is_written_as_fp32_and_long_numbers_as_they_are(tmp_path: Path) -> None:
    values = {
        "half": torch.randn(5).bfloat16(),
        "double": torch.randn(5, dtype=torch.float64),
        "count": torch.tensor([2**40]),
        "flag": torch.tensor([True]),
    }
    fragments = [Fragment(name, tuple(value.shape), 0, value, True) for name, value in values.items()]
    store = Store(tmp_path, write(tmp_path, [fragments]), MODEL)
    for name, value in values.items():
        assert torch.equal(store.whole(name), value.float() if name == "half" else value), name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("z", (3, 4), 0, 12, True), "z is not there"),
        (("a", (4, 3), 0, 12, True), r"a has the shape \[3, 4\], not \[4, 3\]"),
        (("a", (3, 4), 0, 12, False), "a is a tensor of floating-point numbers"),
        (("b", (7,), 0, 7, True), "b lacks its elements from 2 on"),
        (("b", (7,), 5, 2, True), "b lacks its elements from 5 on"),
        (("b", (7,), 1, 2, True), "b lacks its elements from 2 on"),
    ],
)
def test_what_is_not_there_is_said(tmp_path: Path, asked: Any, said: str) -> None:
    files = write(tmp_path, [[cut("a", 0, 12), cut("b", 0, 2)], [cut("b", 4, 5)]])
    store = Store(tmp_path, files, MODEL)
    name, shape, offset, length, floating = asked
    problem = store.problem(name, shape, offset, length, floating=floating)
    assert problem is not None
    with pytest.raises(CheckpointError, match=said):
        raise CheckpointError(problem)
    assert store.problem("b", (7,), 0, 2, floating=True) is None
    with pytest.raises(CheckpointError, match="b lacks its elements from 2 on"):
        store.whole("b")


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    files = write(tmp_path, [[cut("b", 0, 3)], [cut("b", 3, 7)]])
    save_file({"b": torch.zeros(9)}, tmp_path / "model_00001.safetensors")
    with pytest.raises(CheckpointError, match=r"model_00001.*b has the shape \[9\], and \[7\] elsewhere"):
        Store(tmp_path, files, MODEL)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0not json", b"\xff" * 64])
def test_files_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Store(tmp_path, ["model.safetensors"], MODEL)


@pytest.mark.parametrize(
    "metadata",
    [
        "[]",
        "{",
        '{"fragments": {"a": 1}}',
        '{"fragments": {"a": ["a", "x", [2]]}}',
        '{"fragments": {"a": ["a", -1, [9]]}}',
        '{"fragments": {"a": ["a", 8, [9]]}}',
        '{"steps": {"a": "many"}}',
    ],
)
def test_metadata_that_are_none(tmp_path: Path, metadata: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"moemm": metadata})
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        Store(tmp_path, ["model.safetensors"], MODEL)


def test_a_copy_stands_still_and_uses_its_memory_again() -> None:
    value = torch.arange(4.0)
    memory = HostMemory()
    first = memory.copy(RankState({"f": {"a": value}}, {"f": {"k": "v"}}))
    value += 1
    assert first.tensors["f"]["a"].tolist() == [0, 1, 2, 3] and first.metadata == {"f": {"k": "v"}}
    second = memory.copy(RankState({"f": {"a": value}}, {}))
    assert second.tensors["f"]["a"].tolist() == [1, 2, 3, 4]
    assert second.tensors["f"]["a"].data_ptr() == first.tensors["f"]["a"].data_ptr()


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        RankState({"f": {"a": torch.zeros(2)}}, {}).write(tmp_path / "missing")
