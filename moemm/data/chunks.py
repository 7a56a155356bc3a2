"""From the bytes of a file to numpy arrays, without HDF5's decoders.

HDF5's gzip filter inflates until the stream ends, whatever size the chunk declares, so that 264 kB can fill 256 MiB.
Here the index of the chunks comes from HDF5 (hdf5.py), and the bytes are read and decoded with every buffer bounded by
the declared size of one chunk. Reading needs no HDF5 handle, so forked workers share the index.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator

import numpy as np

from moemm.data.limits import refusal, size
from moemm.data.storage import Filter, Storage
from moemm.errors import DataError

_CHECKSUM_BYTES = 4
_REPAIR = "copy the file again from its source, or write it again with moemm.data.write_file"


def fletcher32(data: bytes) -> int:
    """HDF5's Fletcher-32: two sums of big-endian 16-bit words modulo 65535, an odd last byte padded with 0."""
    words = np.frombuffer(data + b"\0" * (len(data) % 2), ">u2").astype(np.uint64)
    if not words.size:
        return 0
    low = int(words.sum())
    high = int((words * np.arange(words.size, 0, -1, dtype=np.uint64)).sum())
    return _folded(high) << 16 | _folded(low)


def _folded(total: int) -> int:
    """`total` modulo 65535 as repeated folding of its upper half gives it: 65535, not 0, for what divides evenly."""
    return (total - 1) % 65535 + 1 if total else 0


def _verify(data: bytes) -> bytes:
    """`data` without its checksum. ValueError where it does not fit."""
    body, stored = data[:-_CHECKSUM_BYTES], int.from_bytes(data[-_CHECKSUM_BYTES:], "little")
    if len(data) < _CHECKSUM_BYTES or fletcher32(body) != stored:
        raise ValueError("the fletcher32 checksum does not fit: bytes were changed after writing")
    return body


def _inflate(data: bytes, limit: int) -> bytes:
    """Inflated `data`. ValueError where the stream is broken or longer than `limit` bytes."""
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"the gzip stream is broken ({error})") from None
    if len(body) > limit:
        raise ValueError(f"the gzip stream holds more than the {size(limit)} that its chunk declares")
    if not stream.eof:
        raise ValueError("the gzip stream ends too early")
    return body


def decode(data: bytes, *, filters: tuple[Filter, ...], mask: int, num_bytes: int, itemsize: int) -> bytes:
    """The `num_bytes` bytes of a chunk from its stored bytes.

    mask: bit i set = filter i was left out for this chunk.
    Raises ValueError: checksum, broken stream, another length than declared.
    """
    for position in reversed(range(len(filters))):
        if mask >> position & 1:
            continue
        name = filters[position]
        if name == "fletcher32":
            data = _verify(data)
        elif name == "gzip":
            data = _inflate(data, num_bytes + _CHECKSUM_BYTES * position)
        elif len(data) == num_bytes:
            data = np.frombuffer(data, np.uint8).reshape(itemsize, -1).T.tobytes()
    if len(data) != num_bytes:
        raise ValueError(f"the chunk holds {len(data)} bytes and declares {num_bytes}")
    return data


def read_chunk(descriptor: int, storage: Storage, position: int) -> np.ndarray:
    """Chunk number `position` (row-major in the grid) as an array of the chunk's shape, native byte order.

    descriptor: of the open file. Raises DataError: broken bytes.
    """
    try:
        if storage.inline is not None:
            data = storage.inline
        else:
            length = int(storage.sizes[position])
            data = os.pread(descriptor, length, int(storage.offsets[position]))
            if len(data) != length:
                raise ValueError("the file ends in the middle of the chunk")
            if storage.pieces:
                data = data.ljust(storage.chunk_bytes, b"\0")
        mask = int(storage.masks[position])
        data = decode(
            data, filters=storage.filters, mask=mask, num_bytes=storage.chunk_bytes, itemsize=storage.dtype.itemsize
        )
    except (ValueError, OSError) as error:
        raise broken(storage, position, error) from None
    array = np.frombuffer(data, storage.dtype).reshape(storage.chunk)
    return array.astype(storage.dtype.newbyteorder("="), copy=False)


def broken(storage: Storage, position: int, error: Exception) -> DataError:
    """The refusal of chunk number `position`."""
    start = int(np.unravel_index(position, storage.grid)[0]) * storage.chunk[0]
    rows = f"rows {start} to {min(start + storage.chunk[0], storage.shape[0]) - 1}"
    return refusal(storage.file, storage.name, f"{rows}: {error}", allowed="intact chunks", do=_REPAIR)


def chunks_of_rows(
    storage: Storage, start: int, stop: int
) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
    """Every chunk that holds some of rows start to stop: (position, where in the chunk, where in the rows)."""
    grid, first = storage.grid, storage.chunk[0]
    axes = [range(start // first, -(-stop // first))] + [range(n) for n in grid[1:]]
    for index in itertools.product(*axes):
        inside, outside = [], []
        for axis, (i, chunk, length) in enumerate(zip(index, storage.chunk, storage.shape, strict=True)):
            low, high = (start, stop) if axis == 0 else (0, length)
            begin, end = max(i * chunk, low), min((i + 1) * chunk, high)
            inside.append(slice(begin - i * chunk, end - i * chunk))
            outside.append(slice(begin - low, end - low))
        yield int(np.ravel_multi_index(index, grid)), tuple(inside), tuple(outside)
