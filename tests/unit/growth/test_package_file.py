"""The bytes of a package: what was written is read, and nothing else."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moemm.errors import CheckpointError
from moemm.growth.package_file import read_package, write_package

CONTENT = {"name": "spectrum", "note": 'quotes " and \\ and ü', "list": [1, 2.5, None, {"a": True}]}
TENSORS = {
    "b.weight": torch.arange(6.0).view(2, 3), "a": torch.tensor(3), "c": torch.zeros(0, 4), "d": torch.ones(2).half()
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_package(tmp_path / "out.moemm", CONTENT, TENSORS)
    return tmp_path / "out.moemm"


def test_what_was_written_is_read(path: Path) -> None:
    content, tensors = read_package(path)
    assert content == CONTENT
    assert set(tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)


def test_other_tools_can_read_it(path: Path) -> None:
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(TENSORS)
        values = json.loads(file.metadata()["moemm"])
    assert values["name"] == "spectrum" and values["format"] == 1 and re.fullmatch("[0-9a-f]{64}", values["sha256"])


def test_the_same_content_has_the_same_bytes(path: Path) -> None:
    other = path.with_name("other.moemm")
    seal = write_package(other, dict(reversed(CONTENT.items())), dict(reversed(TENSORS.items())))
    assert other.read_bytes() == path.read_bytes() and seal.encode() in path.read_bytes()
    assert sorted(file.name for file in path.parent.iterdir()) == ["other.moemm", "out.moemm"]


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x29, 0x80])
def test_no_byte_can_be_changed(path: Path, flip: int) -> None:
    """Length, header, JSON, sha256, padding (0x29 makes a tab of a space, which JSON allows), tensors."""
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"changed|no expert package|has format"):
            read_package(path)
    path.write_bytes(data)
    read_package(path)


def test_it_can_be_cut_nowhere(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="was cut short or changed"):
            read_package(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="was cut short or changed"):
        read_package(path)


class Trap:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_not_opened(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "out.moemm"
    path.write_bytes(pickle.dumps({"a": Trap(tmp_path / "trapped"), "b": "x" * 100}, protocol=protocol))
    with pytest.raises(CheckpointError, match="it is a pickle"):
        read_package(path)
    torch.save({"a": Trap(tmp_path / "trapped")}, path)
    with pytest.raises(CheckpointError, match="it is a pickle"):
        read_package(path)
    assert not (tmp_path / "trapped").exists()


def test_files_that_are_no_packages(tmp_path: Path) -> None:
    path = tmp_path / "out.moemm"
    cases = {
        "no such expert package": None, "was cut short": b"", "no expert package: it is no file": "folder",
        "its header cannot be read": (20).to_bytes(8, "little") + b"this is no JSON at a" + b"l" * 30,
    }  # fmt: skip
    for told, content in cases.items():
        if isinstance(content, bytes):
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=told):
            read_package(tmp_path if content == "folder" else path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no expert package"):
        read_package(path)
    save_file({"a": torch.ones(2)}, path, {"moemm": '{"kind": "something"}'})
    with pytest.raises(CheckpointError, match="its metadata is another's"):
        read_package(path)
    save_file({"a": torch.ones(2)}, path, {"moemm": '{"kind": "moemm expert package", "format": 2}'})
    with pytest.raises(CheckpointError, match="has format 2"):
        read_package(path)
    save_file({"a": torch.ones(2)}, path, {"moemm": '{"kind": "moemm expert package", "format": 1}'})
    with pytest.raises(CheckpointError, match="do not match its sha256"):
        read_package(path)
