"""Open files that tasks and splits share."""

from __future__ import annotations

import os
from typing import Any

import h5py
import pytest

from moemm.data.shared import open_shared
from moemm.errors import DataError


def test_a_file_that_was_changed_or_replaced_is_not_the_one_that_is_open(make_file: Any) -> None:
    path = make_file()
    first, before = open_shared(str(path)), path.stat()
    assert open_shared(str(path)) is first
    old = first.read("image", 0)
    with h5py.File(path, "r+") as file:
        file["modalities/image/data"][0] = old + 1
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size, "neither size nor time tells"
    second = open_shared(str(path))
    assert (second.read("image", 0) == old + 1).all()
    copy = path.with_name("copy.h5")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    copy.replace(path)
    assert open_shared(str(path)) not in (first, second)


def test_a_file_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"nowhere\.h5"):
        open_shared("nowhere.h5")
