"""Rows of stored arrays, fast: small arrays are decoded once and kept, of large ones the last chunks are."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np

from moemm.data.chunks import chunks_of_rows, read_chunk
from moemm.data.heap import Heap
from moemm.data.limits import CACHE_BYTES, CACHE_RATIO, CHUNK_CACHE_BYTES
from moemm.data.storage import Storage
from moemm.errors import DataError


class ArrayCache:
    """Reads rows of the arrays of one file. Safe to use after a fork: reading is by position, without HDF5.

    cache_bytes: decoded arrays to keep; chunk_bytes: decoded chunks to keep of arrays that are larger.
    """

    def __init__(self, path: str, *, cache_bytes: int = CACHE_BYTES, chunk_bytes: int = CHUNK_CACHE_BYTES) -> None:
        self._descriptor = -1  # for __del__, should the next line fail
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.heap = Heap(self._descriptor)
        """Variable-length texts of the same file."""
        self._free = cache_bytes
        self._chunk_free = chunk_bytes
        self._whole: dict[str, np.ndarray] = {}
        self._broken: set[str] = set()
        self._chunks: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def close(self) -> None:
        """Closes the file and forgets what was decoded."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._whole.clear()
        self._chunks.clear()

    def __del__(self) -> None:
        self.close()

    def rows(self, storage: Storage, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` (in range), native byte order, possibly a read-only view. DataError: broken bytes."""
        if self._descriptor < 0:
            raise DataError(f"{storage.file} is closed; open it again with moemm.data.DataFile")
        whole = self._whole.get(storage.name)
        if whole is None and self._keeps(storage):
            whole = self._decode(storage)
        return self._read(storage, start, stop, keep=True) if whole is None else whole[start:stop]

    def kept(self, storage: Storage) -> np.ndarray | None:
        """The whole array, read-only, where it is kept decoded by now."""
        return self._whole.get(storage.name)

    def _decode(self, storage: Storage) -> np.ndarray | None:
        """The whole array, to be kept; None where some of it is broken: its other rows can be read yet."""
        try:
            whole = self._read(storage, 0, storage.shape[0], keep=False)
        except DataError:
            self._broken.add(storage.name)
            return None
        whole.flags.writeable = False
        self._whole[storage.name] = whole
        self._free -= storage.num_bytes
        return whole

    def scan(self, storage: Storage) -> None:
        """Decodes every chunk and keeps none. DataError: broken bytes."""
        for position in range(len(storage.offsets)):
            read_chunk(self._descriptor, storage, position)

    def _keeps(self, storage: Storage) -> bool:
        grows = storage.num_bytes > CACHE_RATIO * max(storage.stored_bytes, 4096)
        return storage.num_bytes <= self._free and not grows and storage.name not in self._broken

    def _read(self, storage: Storage, start: int, stop: int, *, keep: bool) -> np.ndarray:
        out = np.empty((stop - start, *storage.shape[1:]), storage.dtype.newbyteorder("="))
        if out.size:
            for position, inside, outside in chunks_of_rows(storage, start, stop):
                chunk = self._chunk(storage, position) if keep else read_chunk(self._descriptor, storage, position)
                out[outside] = chunk[inside]
        return out

    def _chunk(self, storage: Storage, position: int) -> np.ndarray:
        key = (storage.name, position)
        chunk = self._chunks.pop(key, None)
        if chunk is None:
            chunk = read_chunk(self._descriptor, storage, position)
            self._chunk_free -= chunk.nbytes
            while self._chunk_free < 0 and self._chunks:
                self._chunk_free += self._chunks.popitem(last=False)[1].nbytes
        self._chunks[key] = chunk
        return chunk
