"""The only file that talks to HDF5. Looks at everything before it follows anything.

HDF5 reads other files by design (external links, external storage, virtual datasets), and sizes in a file are claims.
So: links are checked before objects are opened, storage before shapes, and declared sizes against stored bytes. HDF5
itself reads only attributes and the index of the chunks; chunks.py and heap.py read the data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5p, h5s, h5t, h5z

from moemm.data.heap import REFERENCE
from moemm.data.limits import MAX_ATTRIBUTE_BYTES, MAX_ATTRIBUTES, MAX_DIMENSIONS, MAX_LINKS, printable, refusal, size
from moemm.data.storage import Filter, Storage, check_declared, check_file, check_stored, in_chunks, in_one_piece, lies
from moemm.errors import DataError

Attribute = str | int | float | bool

_FILTERS: dict[int, Filter] = {
    h5z.FILTER_SHUFFLE: "shuffle",
    h5z.FILTER_DEFLATE: "gzip",
    h5z.FILTER_FLETCHER32: "fletcher32",
}
_LINKS = {h5l.TYPE_SOFT: "a soft link", h5l.TYPE_EXTERNAL: "a link to another file"}
_NUMBERS = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_CLASSES = {
    h5t.COMPOUND: "compound",
    h5t.REFERENCE: "reference",
    h5t.OPAQUE: "opaque",
    h5t.VLEN: "variable-length array",
    h5t.ARRAY: "array",
    h5t.ENUM: "enumeration",
    h5t.STRING: "fixed-length text",
}
_REWRITE = "write the data into the file itself with moemm.data.write_file"
_NONE = np.zeros(0, np.int64)
_MANY_CHUNKS = 1 << 16
"""Opening a file takes time for each: benchmarks/reading.py."""


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """A dataset that passed every check. `text`: its elements are references into the heap of texts."""

    storage: Storage
    attributes: dict[str, Attribute]
    text: bool


class Container:
    """A file opened read-only, nothing of which is trusted. Methods raise DataError for what is broken or hostile."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.num_bytes = check_file(self.path)
        with self.guard("/"):
            self._file = h5py.File(self.path, "r")
            plist = self._file.id.get_create_plist()
            if plist.get_userblock() or plist.get_sizes() != (8, 8):
                raise self.refuse("/", "a user block or addresses that are not 8 bytes", allowed="a plain HDF5 file")
            self.root = h5o.open(self._file.id, b"/")

    def close(self) -> None:
        """Closes the file and all objects that were opened from it."""
        with suppress(Exception):
            self._file.close()

    @contextmanager
    def guard(self, place: str) -> Iterator[None]:
        """Whatever HDF5 raises inside becomes a DataError that names the file and `place`."""
        try:
            yield
        except DataError:
            raise
        except Exception as error:
            found = f"HDF5 cannot read it ({printable(str(error), limit=200)})"
            do = "check that the copy is complete (its size, its checksum) and fetch it again"
            raise self.refuse(place, found, allowed="a complete, unchanged HDF5 file", do=do) from None

    def refuse(self, place: str, found: str, *, allowed: str, do: str = _REWRITE) -> DataError:
        """A DataError about `place` in this file."""
        return refusal(self.path, place, found, allowed=allowed, do=do)

    def links(self, group: h5g.GroupID, place: str) -> list[str]:
        """The names in `group` in alphabetical order. All of them must be hard links: objects of this file."""
        with self.guard(place):
            count = group.get_num_objs()
            if count > MAX_LINKS:
                raise self.refuse(place, f"{count} names", allowed=f"up to {MAX_LINKS} in a group")
            names = [group.get_objname_by_idx(position) for position in range(count)]
            for name in names:
                kind = group.links.get_info(name).type
                if kind != h5l.TYPE_HARD:
                    found = (
                        f"{printable(name.decode('utf-8', 'replace'))!r} is {_LINKS.get(kind, 'a user-defined link')}"
                    )
                    raise self.refuse(place, found, allowed="objects that lie in this file, under their own names")
            return sorted(name.decode("utf-8", "replace") for name in names)

    def group(self, parent: h5g.GroupID, name: str, place: str) -> h5g.GroupID:
        """The group `name` of `parent`, whose links were checked by `links`."""
        with self.guard(place):
            found = h5o.open(parent, name.encode())
            if not isinstance(found, h5g.GroupID):
                raise self.refuse(place, "not a group", allowed="a group")
            return found

    def attributes(self, owner: h5g.GroupID | h5d.DatasetID, place: str) -> dict[str, Attribute]:
        """All attributes of an object: texts, numbers and bools, one value each."""
        with self.guard(place):
            count = h5a.get_num_attrs(owner)
            if count > MAX_ATTRIBUTES:
                raise self.refuse(place, f"{count} attributes", allowed=f"up to {MAX_ATTRIBUTES} an object")
            return dict(self._attribute(h5a.open(owner, index=i), place) for i in range(count))

    def _attribute(self, attribute: h5a.AttrID, place: str) -> tuple[str, Attribute]:
        name = attribute.name.decode("utf-8", "replace")
        place = f"{place}@{name}"
        kind, space, num_bytes = attribute.get_type(), attribute.get_space(), attribute.get_storage_size()
        simple = kind.get_class() in (h5t.INTEGER, h5t.FLOAT, h5t.STRING) or _is_bool(kind)
        if not simple or space.get_simple_extent_npoints() != 1 or num_bytes > MAX_ATTRIBUTE_BYTES:
            found = f"{space.get_simple_extent_npoints()} values of class {_class_name(kind)}, {size(num_bytes)}"
            allowed = f"one text, number or bool of up to {size(MAX_ATTRIBUTE_BYTES)}; lists are JSON text"
            raise self.refuse(place, found, allowed=allowed)
        array = np.empty(space.get_simple_extent_dims(), attribute.dtype)
        attribute.read(array)
        value: object = array.reshape(())[()]
        if isinstance(value, bytes):
            if len(value) > MAX_ATTRIBUTE_BYTES:
                raise self.refuse(place, f"text of {size(len(value))}", allowed=f"up to {size(MAX_ATTRIBUTE_BYTES)}")
            return name, self.utf8(value, place)
        return name, value.item()  # type: ignore[attr-defined]

    def utf8(self, value: bytes, place: str) -> str:
        """`value` as text."""
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"text that is not UTF-8 ({error.reason} at byte {error.start})"
            raise self.refuse(place, found, allowed="UTF-8", do="encode it as UTF-8 and write it again") from None

    def dataset(self, parent: h5g.GroupID, name: str, place: str) -> StoredDataset:
        """The dataset `name` of `parent` (links checked by `links`), described and checked; nothing of it is read."""
        with self.guard(place):
            found = h5o.open(parent, name.encode())
            if not isinstance(found, h5d.DatasetID):
                raise self.refuse(place, "not a dataset", allowed="a dataset")
            plist = found.get_create_plist()
            self._check_local(plist, place)
            dtype, filters = self._dtype(found.get_type(), place), self._filters(plist, place)
            storage = self._storage(found, plist, self._declared(found, place, dtype=dtype, filters=filters))
            check_stored(storage, file_bytes=self.num_bytes)
            return StoredDataset(storage, self.attributes(found, place), dtype == REFERENCE)

    def _check_local(self, plist: h5p.PropDCID, place: str) -> None:
        """Comes before anything asks for the shape: HDF5 may open the sources of a virtual dataset to answer that."""
        if plist.get_layout() == h5d.VIRTUAL:
            raise self.refuse(place, "a virtual dataset, which reads other files", allowed="data stored in this file")
        if plist.get_external_count():
            raise self.refuse(place, "external storage, which reads other files", allowed="data stored in this file")

    def _filters(self, plist: h5p.PropDCID, place: str) -> tuple[Filter, ...]:
        codes = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        if len(set(codes)) < len(codes) or not set(codes) <= set(_FILTERS):
            allowed = "gzip (1), shuffle (2) and fletcher32 (3), each at most once"
            raise self.refuse(place, f"filters {codes}", allowed=allowed, do="repack it: h5repack -f GZIP=4 OLD NEW")
        return tuple(_FILTERS[code] for code in codes)

    def _dtype(self, kind: h5t.TypeID, place: str) -> np.dtype[np.generic]:
        if kind.get_class() == h5t.STRING and kind.is_variable_str():
            return REFERENCE
        if _is_bool(kind):
            return np.dtype(bool)
        if kind.get_class() in (h5t.INTEGER, h5t.FLOAT):
            dtype = kind.dtype
            if dtype.name in _NUMBERS and h5t.py_create(dtype).equal(kind):
                return dtype
        allowed = f"{', '.join(_NUMBERS)}, bool, variable-length text"
        raise self.refuse(place, f"elements of class {_class_name(kind)}", allowed=allowed)

    def _declared(
        self, found: h5d.DatasetID, place: str, *, dtype: np.dtype[np.generic], filters: tuple[Filter, ...]
    ) -> Storage:
        space = found.get_space()
        if space.get_simple_extent_type() != h5s.SIMPLE or not 1 <= space.get_simple_extent_ndims() <= MAX_DIMENSIONS:
            raise self.refuse(
                place, "a scalar, empty or many-dimensional dataset", allowed=f"1 to {MAX_DIMENSIONS} axes"
            )
        shape = tuple(int(n) for n in space.get_simple_extent_dims())
        plist = found.get_create_plist()
        chunked = plist.get_layout() == h5d.CHUNKED
        return Storage(
            file=self.path,
            name=place,
            shape=shape,
            dtype=dtype,
            chunk=tuple(int(n) for n in (plist.get_chunk() if chunked else shape)),
            offsets=_NONE,
            sizes=_NONE,
            masks=_NONE,
            filters=filters,
            pieces=not chunked,
        )

    def _storage(self, found: h5d.DatasetID, plist: h5p.PropDCID, array: Storage) -> Storage:
        check_declared(array, file_bytes=self.num_bytes)
        if array.num_bytes == 0:
            return array
        if plist.get_layout() == h5d.COMPACT:
            return self._compact(found, array)
        if plist.get_layout() == h5d.CHUNKED:
            return in_chunks(array, _chunk_records(found, math.prod(array.grid)))
        offset = found.get_offset()
        if offset is None or found.get_storage_size() != array.num_bytes:
            raise lies(array, stored=0 if offset is None else found.get_storage_size())
        return in_one_piece(array, offset=offset)

    def _compact(self, found: h5d.DatasetID, array: Storage) -> Storage:
        if array.dtype == REFERENCE or found.get_storage_size() != array.num_bytes:
            raise self.refuse(array.name, "text or a false size in compact storage", allowed="chunked storage")
        data = np.empty(array.shape, array.dtype)
        found.read(h5s.ALL, h5s.ALL, data)
        zero = np.zeros(1, np.int64)
        stored = zero + array.num_bytes
        return replace(array, offsets=zero, sizes=stored, masks=zero, pieces=False, inline=data.tobytes())


def _chunk_records(found: h5d.DatasetID, expected: int) -> list[tuple[tuple[int, ...], int, int, int]]:
    """(first element, mask, position in the file, stored bytes) of each chunk, one more than `expected` at most."""
    records: list[tuple[tuple[int, ...], int, int, int]] = []

    def note(chunk: h5d.StoreInfo) -> bool | None:
        records.append((chunk.chunk_offset, chunk.filter_mask, chunk.byte_offset, chunk.size))
        return True if len(records) > expected else None

    found.chunk_iter(note)
    return records


def _is_bool(kind: h5t.TypeID) -> bool:
    return kind.get_class() == h5t.ENUM and kind.get_size() == 1 and bool(kind.equal(h5t.py_create(np.dtype(bool))))


def _class_name(kind: h5t.TypeID) -> str:
    code = kind.get_class()
    return _CLASSES.get(code, f"number of {kind.get_size()} bytes")


@dataclass(frozen=True, slots=True)
class Node:
    """An object to write: attributes, and an array or a list of texts (None: a group)."""

    data: np.ndarray | list[str] | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


def write_tree(path: str | os.PathLike[str], nodes: Mapping[str, Node], *, chunk_bytes: int) -> None:
    """Writes `nodes` (object path -> node, parents first) as a new HDF5 file with checksums on data and on metadata.

    chunk_bytes: decoded size that chunks aim at, see chunk_rows; a chunk holds whole rows where a row is smaller.
    """
    with h5py.File(os.fspath(path), "w", libver=("v110", "v110")) as file:
        for name, node in nodes.items():
            owner = file if name == "/" else _write_node(file, name, node, chunk_bytes)
            for key, value in node.attributes.items():
                if isinstance(value, str):
                    encoded = value.encode()
                    kind = h5py.string_dtype("utf-8", max(len(encoded), 1))
                    owner.attrs.create(key, np.bytes_(encoded), dtype=kind)
                else:
                    owner.attrs[key] = value


def chunk_rows(rows: int, row_bytes: int, chunk_bytes: int) -> int:
    """Rows of a chunk of an array: about `chunk_bytes`, up to 4 times that where there would be too many chunks."""
    aimed = min(4 * chunk_bytes, max(chunk_bytes, rows * row_bytes // _MANY_CHUNKS))
    return max(1, min(rows, aimed // row_bytes))


def _write_node(file: h5py.File, name: str, node: Node, chunk_bytes: int) -> h5py.Group | h5py.Dataset:
    if node.data is None:
        return file.create_group(name)
    texts = isinstance(node.data, list)
    data = np.array(node.data, object) if isinstance(node.data, list) else node.data
    if data.size == 0:
        return file.create_dataset(name, data=data, dtype=h5py.string_dtype() if texts else None)
    row = (REFERENCE.itemsize if texts else data.itemsize) * math.prod(data.shape[1:])
    rows = chunk_rows(data.shape[0], row, chunk_bytes)
    return file.create_dataset(
        name,
        data=data,
        dtype=h5py.string_dtype() if texts else None,
        chunks=(rows, *data.shape[1:]),
        compression="gzip",
        compression_opts=6,
        shuffle=not texts and data.itemsize > 1,
        fletcher32=not texts,
    )
