"""Samples that cannot be used: found when they are read, put aside, and replaced by a rule that every rank follows.

The next sample of the same task that is sound, in the order of the file's split, stands in for one that is not. So
which samples a step trains on depends neither on the number of ranks and workers nor on who found what before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moemm.data.sample import Sample
from moemm.data.value import Table, Value
from moemm.errors import DataError

IN_A_ROW = 100
"""Broken samples one after the other that end the search for a sound one."""


class BadSampleError(DataError):
    """A sample that is broken; says which. key: its data set's group in the file, as in HDF5."""

    def __init__(self, message: str, *, file: str, key: str, index: int) -> None:
        super().__init__(message)
        self.file, self.key, self.index = file, key, index

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (str(self), self.file, self.key, self.index)


def _again(message: str, file: str, key: str, index: int) -> BadSampleError:
    return BadSampleError(message, file=file, key=key, index=index)


@dataclass(frozen=True, slots=True)
class Bad:
    """A sample that was put aside. index: its place in the file; by: that of the sample that stands in for it."""

    file: str
    key: str
    index: int
    reason: str
    task: str
    by: int


def flaw(value: Value) -> str | None:
    """What makes a value useless for training, though it can be read: infinite numbers, or no number at all."""
    if isinstance(value, Table):
        return "an infinite number" if np.isinf(value.num).any() else None
    if isinstance(value, str) or value.dtype.kind != "f" or not value.size or np.isfinite(value).all():
        return None
    if np.isinf(value).any():
        return "an infinite number"
    return "no number in it, only NaN" if np.isnan(value).all() else None


def check(sample: Sample, file: str, stored: Callable[[str], str]) -> Sample:
    """`sample`. Raises BadSampleError where one of its values has a flaw. stored: name in the run -> in the file."""
    for name, value in sample.modalities.items():
        found = flaw(value)
        if found:
            key = f"/modalities/{stored(name)}"
            raise BadSampleError(
                f"{file}: {key}: sample {sample.index}: {found}\n  allowed: finite numbers; NaN for missing ones\n"
                "  to do: correct the sample, or leave it out of the file",
                file=file, key=key, index=sample.index,
            )  # fmt: skip
    return sample


def first_sound(read: Callable[[int], Sample], start: int, size: int) -> tuple[Sample, list[Bad]]:
    """The first of the samples `start`, `start` + 1, ... (of `size`, in a circle) that is sound, and those before it.

    read: number -> sample. Raises DataError after IN_A_ROW broken ones, or when all are broken.
    """
    found: list[tuple[str, str, int, str]] = []  # not the errors, whose frames would keep the file open
    first = ""
    for number in range(start, start + min(size, IN_A_ROW)):
        try:
            sample = read(number % size)
        except BadSampleError as error:
            found.append((error.file, error.key, error.index, _reason(error)))
            first = first or str(error)
            continue
        return sample, [Bad(*each, sample.task, sample.index) for each in found]
    raise DataError(
        f"{found[0][0]}: {len(found)} samples in a row are broken, the first of them:\n{first}\n"
        "  allowed: single broken samples, which others stand in for\n"
        "  to do: check the file with `moemm data validate`; fetch it again, or write it again"
    )


def _reason(error: BadSampleError) -> str:
    """The first line of an error without the place, which has fields of its own."""
    line = str(error).splitlines()[0]
    return line.removeprefix(f"{error.file}: ").removeprefix(f"{error.key}: ").removeprefix(f"sample {error.index}: ")
