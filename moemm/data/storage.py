"""Where an array lies in a file, and whether what the file claims about it can be true."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moemm.data.limits import KIB, MAX_CHUNK_BYTES, MAX_ROW_BYTES, refusal, size
from moemm.errors import DataError

Filter = Literal["shuffle", "gzip", "fletcher32"]
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_INFLATION = 1100
"""DEFLATE cannot inflate further than 1032-fold; small chunks carry some bytes around that."""
_SLACK_BYTES = 64 * KIB
_PIECE_BYTES = 256 * KIB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Storage:
    """Where one array lies in its file.

    chunk: shape of a chunk.
    offsets, sizes, masks: (chunks,) int64, position in the file, stored bytes and left-out filters of each chunk, in
        row-major order of the grid of chunks.
    filters: in the order in which they were applied at writing.
    pieces: the array is stored in one piece without chunks; `chunk` cuts it up, and its last cut may be short.
    inline: the data itself, where HDF5 keeps it in its header (small arrays).
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    chunk: tuple[int, ...]
    offsets: np.ndarray
    sizes: np.ndarray
    masks: np.ndarray
    filters: tuple[Filter, ...]
    pieces: bool = False
    inline: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array once decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (first axis) once decoded."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk once decoded."""
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes that the array takes in the file."""
        return int(self.sizes.sum())

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // c) if n else 0 for n, c in zip(self.shape, self.chunk, strict=True))

    @property
    def checked(self) -> bool:
        """Whether a flipped bit in the stored data is noticed (gzip carries a checksum too)."""
        return "fletcher32" in self.filters or "gzip" in self.filters


def in_one_piece(array: Storage, *, offset: int) -> Storage:
    """`array` (its chunk is its shape) as one run of bytes from `offset`, cut into pieces that are cheap to read."""
    rows = max(1, min(array.shape[0], _PIECE_BYTES // array.row_bytes))
    starts = np.arange(0, array.num_bytes, rows * array.row_bytes)
    sizes = np.minimum(rows * array.row_bytes, array.num_bytes - starts)
    return _placed(array, starts + offset, sizes, starts * 0, chunk=(rows, *array.shape[1:]), pieces=True)


def in_chunks(array: Storage, records: Sequence[tuple[tuple[int, ...], int, int, int]]) -> Storage:
    """`array` with its index of chunks.

    records: (first element, mask, position in the file, stored bytes) of each chunk, in any order.
    Raises ValueError: a chunk that is missing, doubled, or does not lie on the grid.
    """
    total = math.prod(array.grid)
    table = np.full((3, total), -1, np.int64)
    for first, mask, offset, length in records:
        if any(n % c for n, c in zip(first, array.chunk, strict=True)):
            raise ValueError(f"a chunk at {first} that does not lie on the grid")
        position = int(np.ravel_multi_index([n // c for n, c in zip(first, array.chunk, strict=True)], array.grid))
        table[:, position] = offset, length, mask
    if (table[0] < 0).any():
        raise ValueError(f"{int((table[0] < 0).sum())} of {total} chunks were never written")
    return _placed(array, table[0], table[1], table[2], chunk=array.chunk, pieces=False)


def _placed(
    array: Storage, offsets: np.ndarray, sizes: np.ndarray, masks: np.ndarray, *, chunk: tuple[int, ...], pieces: bool
) -> Storage:
    return Storage(
        file=array.file,
        name=array.name,
        shape=array.shape,
        dtype=array.dtype,
        chunk=chunk,
        offsets=offsets,
        sizes=sizes,
        masks=masks,
        filters=array.filters,
        pieces=pieces,
    )


def check_declared(array: Storage, *, file_bytes: int) -> None:
    """Refuses an array that cannot be true or is too large to read, from its shape and chunk alone."""
    if array.row_bytes > MAX_ROW_BYTES:
        _refuse(array, f"{size(array.row_bytes)} a sample", allowed=f"up to {size(MAX_ROW_BYTES)}")
    if array.chunk_bytes > MAX_CHUNK_BYTES and not array.pieces:
        _refuse(array, f"chunks of {size(array.chunk_bytes)}", allowed=f"up to {size(MAX_CHUNK_BYTES)}")
    if math.prod(array.grid) > file_bytes or array.num_bytes > _INFLATION * file_bytes:
        raise lies(array, stored=file_bytes)


def check_stored(array: Storage, *, file_bytes: int) -> None:
    """Refuses an array whose chunks lie outside the file or cannot hold what they declare."""
    ends = array.offsets + array.sizes
    outside = (array.offsets < 0) | (array.sizes < 0) | (ends > file_bytes)
    if outside.any():
        _refuse(array, "bytes that lie beyond the end of the file", allowed=f"bytes inside its {size(file_bytes)}")
    largest = int(array.sizes.max(initial=0))
    if largest > array.chunk_bytes + array.chunk_bytes // 100 + KIB:
        _refuse(array, f"{size(largest)} for a chunk of {size(array.chunk_bytes)}", allowed="no more than it declares")
    if array.num_bytes > _INFLATION * array.stored_bytes + _SLACK_BYTES:
        raise lies(array, stored=array.stored_bytes)


def lies(array: Storage, *, stored: int) -> DataError:
    """The refusal of an array that declares more than its bytes can hold."""
    return refusal(
        array.file,
        array.name,
        f"declares {size(array.num_bytes)} (shape {array.shape}) and stores {size(stored)}",
        allowed="every declared element stored in the file",
        do="write all its elements, or fetch the file again",
    )


def _refuse(array: Storage, found: str, *, allowed: str) -> None:
    raise refusal(array.file, array.name, found, allowed=allowed, do="write the file again with moemm.data.write_file")


def file_state(status: os.stat_result) -> tuple[int, ...]:
    """What is another once a file was replaced or changed, as far as the clock of its file system can tell."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def check_file(path: str) -> int:
    """Size of the regular HDF5 file `path`; DataError for anything else (a pipe would block, a device never end)."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise refusal(path, "/", "a folder, pipe or device", allowed="an HDF5 file", do="check the path")
        with open(path, "rb") as file:
            start = file.read(len(_SIGNATURE))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise refusal(path, "/", reason, allowed="an HDF5 file that can be read", do="check the path") from None
    if start != _SIGNATURE:
        found = "not an HDF5 file" if start else "an empty file"
        raise refusal(path, "/", found, allowed="an HDF5 file", do="check the path, or fetch the file again")
    return status.st_size
