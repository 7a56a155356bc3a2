"""What a file may ask for, so that no file costs more memory than these limits add up to; and how a refusal reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from moemm.errors import DataError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

MAX_CHUNK_BYTES = 32 * MIB
"""Decoded size of one HDF5 chunk."""
MAX_ROW_BYTES = 64 * MIB
"""Decoded size of one modality of one sample."""
MAX_TEXT_BYTES = 1 * MIB
"""UTF-8 bytes of one text."""
MAX_MODALITIES = 256
MAX_LINKS = 1024
"""Names in one group."""
MAX_ATTRIBUTES = 64
MAX_ATTRIBUTE_BYTES = 1 * MIB
MAX_OUTPUTS = 1_000_000
"""Classes of a label, or columns of a target."""
MAX_DIMENSIONS = 8
READ_SECONDS = 10.0
"""Time to read the structure of a file; more for each GiB."""
CACHE_BYTES = 256 * MIB
"""Decoded arrays that one open file keeps."""
CACHE_RATIO = 64
"""Arrays that inflate further than this are never decoded whole, only row by row."""
CHUNK_CACHE_BYTES = 64 * MIB
"""Decoded chunks that one open file keeps for arrays that are too large to keep whole."""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
"""Names of modalities, kinds and labels: they become module names, tags and table cells."""


def size(num_bytes: float) -> str:
    """Bytes as a person reads them: '1.5 MiB'."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError


def printable(text: object, *, limit: int = 120) -> str:
    """`text` without control characters (a file's strings reach terminals), cut to `limit` characters."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text)[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def refusal(file: str, place: str, found: str, *, allowed: str, do: str) -> DataError:
    """A DataError in the house's form: file, object, what was found, what is allowed, what to do."""
    return DataError(f"{file}: {printable(place)}: {found}\n  allowed: {allowed}\n  to do: {do}")


class Collected:
    """DataErrors of several checks, so that a person sees all of them at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def run(self, check: Callable[..., Any], *arguments: Any) -> Any:
        """What `check` returns; None where it raises DataError, which is kept."""
        try:
            return check(*arguments)
        except DataError as error:
            self.messages.append(str(error))
            return None


@contextmanager
def collected() -> Iterator[Collected]:
    """At its end raises one DataError with the messages of all checks that ran in it and failed."""
    errors = Collected()
    yield errors
    if errors.messages:
        raise DataError("\n".join(errors.messages))
