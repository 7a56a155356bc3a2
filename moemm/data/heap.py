"""Variable-length text of a file, read from HDF5's global heap with every length checked before it is used.

A text dataset stores one reference a row: (length, address of a heap collection, number of the object in it). A
collection is `GCOL`, version 1, 3 bytes, its size (8 bytes), then objects: number (2), count (2), 4 bytes, size (8),
and the text, padded to 8 bytes.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict

import numpy as np

from moemm.data.limits import MAX_TEXT_BYTES, MIB, size

REFERENCE = np.dtype([("length", "<u4"), ("address", "<u8"), ("number", "<u4")])
_COLLECTION = struct.Struct("<4sB3xQ")
_OBJECT = struct.Struct("<HH4xQ")
_LARGEST_COLLECTION = 64 * MIB
_KEPT = 64


class Heap:
    """Texts of the file open as `descriptor`; ValueError for every claim that does not hold."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._file_bytes = os.fstat(descriptor).st_size
        self._collections: OrderedDict[int, tuple[bytes, dict[int, tuple[int, int]]]] = OrderedDict()

    def read(self, reference: np.void) -> bytes:
        """The bytes that one element of a REFERENCE array points to."""
        length, address, number = (int(reference[name]) for name in ("length", "address", "number"))
        if length == 0:
            return b""
        if length > MAX_TEXT_BYTES:
            raise ValueError(f"a text of {size(length)}, more than the {size(MAX_TEXT_BYTES)} that one may have")
        data, objects = self._collection(address)
        start, stored = objects.get(number, (0, -1))
        if stored < length:
            raise ValueError(f"a text of {length} bytes that is not in the heap at {address}")
        return data[start : start + length]

    def _collection(self, address: int) -> tuple[bytes, dict[int, tuple[int, int]]]:
        found = self._collections.pop(address, None)
        if found is None:
            data = self._load(address)
            found = data, _objects(data)
            while len(self._collections) >= _KEPT or self._num_bytes() + len(data) > _LARGEST_COLLECTION:
                if not self._collections:
                    break
                self._collections.popitem(last=False)
        self._collections[address] = found
        return found

    def _num_bytes(self) -> int:
        return sum(len(data) for data, _ in self._collections.values())

    def _load(self, address: int) -> bytes:
        header = os.pread(self._descriptor, _COLLECTION.size, address) if address < self._file_bytes else b""
        if len(header) < _COLLECTION.size:
            raise ValueError(f"a text at {address}, beyond the end of the file")
        signature, version, length = _COLLECTION.unpack(header)
        if signature != b"GCOL" or version != 1:
            raise ValueError(f"no heap of texts at {address}")
        if length > min(_LARGEST_COLLECTION, self._file_bytes - address):
            raise ValueError(f"a heap of {size(length)} at {address}, more than the file holds")
        return os.pread(self._descriptor, length, address)


def _objects(data: bytes) -> dict[int, tuple[int, int]]:
    """Number of the object -> (start, bytes) in its collection. Number 0 is the free space at the end."""
    objects: dict[int, tuple[int, int]] = {}
    position = _COLLECTION.size
    while position + _OBJECT.size <= len(data):
        number, _, length = _OBJECT.unpack_from(data, position)
        start = position + _OBJECT.size
        if number == 0:
            break
        if start + length > len(data):
            raise ValueError("a heap of texts whose parts are longer than itself")
        objects[number] = start, length
        position = start + -(-length // 8) * 8
    return objects
