"""Version 1 of moemm's HDF5 layout: which objects a file holds, what each must be, and how the file describes itself.

docs/data.md is the specification. Nothing here reads data: only names, attributes, shapes and types are looked at.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np

from moemm.data.apart import Stopped, run_apart
from moemm.data.catalogue import ModalityInfo
from moemm.data.hdf5 import Attribute, Container, StoredDataset
from moemm.data.limits import GIB, MAX_MODALITIES, MAX_OUTPUTS, NAME, READ_SECONDS, collected, printable, refusal
from moemm.data.storage import Storage, check_file, file_state

FORMAT = "moemm-1"
FORMATS = (FORMAT, "moemm-suite-1")
"""What the root attribute `format` may say: what the writer writes, and the same layout by another name."""
_RESTLESS_SECONDS = 2.0
"""Clocks of file systems tick as slowly as that."""
Form = Literal["fixed", "ragged", "text", "tabular"]

_PARTS: dict[Form, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fixed": (("data",), ("present",)),
    "ragged": (("data", "offsets"), ()),
    "text": (("data",), ("crc32",)),
    "tabular": (("num", "cat"), ()),
}
"""Datasets of a modality, by form: those that it must have, those that it may have."""


@dataclass(frozen=True, slots=True)
class StoredModality:
    """One modality of a file: how it is described, and where its parts lie."""

    info: ModalityInfo
    form: Form
    parts: dict[str, Storage]
    attributes: dict[str, Attribute]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All of a file but its data. `labels`, `label_attributes` and `class_names` have the same keys."""

    attributes: dict[str, Attribute]
    split: Storage | None
    group: Storage | None
    labels: dict[str, Storage]
    label_attributes: dict[str, dict[str, Attribute]]
    modalities: dict[str, StoredModality]
    num_samples: int
    num_bytes: int
    sources: tuple[str, ...]
    class_names: dict[str, tuple[str, ...]]
    ignored: tuple[str, ...]

    def of_label(self, name: str) -> dict[str, Any]:
        """Attributes of a label; those of `label` may stand at the root."""
        return _of_label(name, self.attributes, self.label_attributes[name])

    def storages(self) -> list[Storage]:
        """Every stored array."""
        columns = [*(one for one in (self.split, self.group) if one is not None), *self.labels.values()]
        return columns + [part for modality in self.modalities.values() for part in modality.parts.values()]


def load_layout(path: str, *, labelled: bool = True) -> Layout:
    """The layout of the file at `path`, read in a process of its own. DataError: a broken or hostile file.

    A file that has not changed since this process read it last is not read again.
    labelled: refuse a file without labels or /split.
    """
    num_bytes = check_file(path)
    state = _settled(path)
    if state is None:
        return _read_apart(path, labelled, num_bytes)
    return _known(path, labelled, state, num_bytes)


def _settled(path: str) -> tuple[int, ...] | None:
    """What is another once the file changes; None for one that changed so lately that a further change may not show."""
    status = os.stat(path)
    if max(status.st_mtime, status.st_ctime) > time.time() - _RESTLESS_SECONDS:
        return None
    return file_state(status)


@lru_cache(maxsize=256)
def _known(path: str, labelled: bool, state: tuple[int, ...], num_bytes: int) -> Layout:
    return _read_apart(path, labelled, num_bytes)


def _read_apart(path: str, labelled: bool, num_bytes: int) -> Layout:
    read = partial(_read_file, path, labelled)
    seconds = READ_SECONDS * (1 + num_bytes / GIB)
    try:
        return run_apart(read, seconds=seconds) if hasattr(os, "fork") else read()
    except Stopped as stopped:
        found = f"HDF5 came to no end with its structure ({printable(stopped, limit=200)})"
        do = "check that the copy is complete (its size, its checksum) and fetch it again"
        raise refusal(path, "/", found, allowed="a complete, unchanged HDF5 file", do=do) from None


def _read_file(path: str, labelled: bool) -> Layout:
    container = Container(path)
    try:
        return read_layout(container, labelled=labelled)
    finally:
        container.close()


def read_layout(file: Container, *, labelled: bool = True) -> Layout:
    """The layout of an open file. DataError: a part that is missing, of the wrong kind, or disagrees with another.

    labelled: as that of load_layout.
    """
    attributes = file.attributes(file.root, "/")
    if attributes.get("format") not in FORMATS:
        found = f"format {printable(attributes.get('format'))!r}"
        raise file.refuse("/", found, allowed=" or ".join(FORMATS), do="write it with moemm.data.write_file")
    names = file.links(file.root, "/")
    columns = {name: file.dataset(file.root, name, f"/{name}") for name in names if _is_column(name)}
    labels = {name: column for name, column in columns.items() if name.startswith("label")}
    if labelled:
        _check_labelled(file, columns, labels)
    if "modalities" not in names:
        raise file.refuse("/", "no group 'modalities'", allowed="/modalities with a group for each modality")
    num_samples = columns["split"].storage.shape[0] if "split" in columns else _count(file, columns)
    _check_columns(file, columns, labels, num_samples)
    return Layout(
        attributes=attributes,
        split=columns["split"].storage if "split" in columns else None,
        group=columns["group"].storage if "group" in columns else None,
        labels={name: column.storage for name, column in labels.items()},
        label_attributes={name: column.attributes for name, column in labels.items()},
        modalities=_modalities(file, num_samples),
        num_samples=num_samples,
        num_bytes=file.num_bytes,
        sources=json_names(file, attributes, "sources", "/"),
        class_names={name: _class_names(file, attributes, name, column) for name, column in labels.items()},
        ignored=tuple(name for name in names if name not in columns and name != "modalities"),
    )


def _of_label(name: str, root: Mapping[str, Attribute], own: Mapping[str, Attribute]) -> dict[str, Any]:
    return {**(root if name == "label" else {}), **own}


def _class_names(file: Container, root: Mapping[str, Attribute], name: str, column: StoredDataset) -> tuple[str, ...]:
    return json_names(file, _of_label(name, root, column.attributes), "class_names", f"/{name}")


def _is_column(name: str) -> bool:
    return name in ("label", "split", "group") or (name.startswith("label_") and bool(NAME.fullmatch(name)))


def _count(file: Container, columns: Mapping[str, StoredDataset]) -> int:
    """Samples of a file without /split: by its labels, or by what its first modality declares."""
    for column in columns.values():
        return column.storage.shape[0]
    parent = file.group(file.root, "modalities", "/modalities")
    for name in file.links(parent, "/modalities"):
        place = f"/modalities/{name}"
        group = file.group(parent, name, place)
        parts = file.links(group, place)
        for part, more in (("offsets", 1), ("num", 0), ("data", 0)):
            if part in parts:
                return file.dataset(group, part, f"{place}/{part}").storage.shape[0] - more
    return 0


def _check_labelled(file: Container, columns: Mapping[str, StoredDataset], labels: Mapping[str, StoredDataset]) -> None:
    if not labels:
        raise file.refuse("/", "no labels", allowed="a dataset 'label' (or 'label_NAME') with a target for each sample")
    if "split" not in columns:
        raise file.refuse("/", "no dataset 'split'", allowed="/split: 0 train, 1 val, 2 test, 3 ood for each sample")


def _check_columns(
    file: Container, columns: Mapping[str, StoredDataset], labels: Mapping[str, StoredDataset], num_samples: int
) -> None:
    if not 0 < num_samples <= file.num_bytes:
        place = "/split" if "split" in columns else "/modalities"
        raise file.refuse(place, f"{num_samples} samples", allowed="at least 1, and no more than the file has bytes")
    rows_of = "/split" if "split" in columns else "its other columns"
    for name, column in columns.items():
        shape, dtype = column.storage.shape, column.storage.dtype
        if shape[0] != num_samples:
            raise file.refuse(f"/{name}", f"{shape[0]} rows", allowed=f"{num_samples}, as many as {rows_of}")
        integers = len(shape) == 1 and dtype.kind in "iu"
        if name in labels and not integers:
            multilabel = len(shape) == 2 and dtype == np.uint8
            if not multilabel and not (dtype.kind == "f" and len(shape) <= 2):
                allowed = "(N,) int64 classes, (N, C) uint8 multilabel, (N,) or (N, C) float32 regression"
                raise file.refuse(f"/{name}", f"shape {shape} of {dtype.name}", allowed=allowed)
            if len(shape) == 2 and not 1 <= shape[1] <= MAX_OUTPUTS:
                raise file.refuse(f"/{name}", f"{shape[1]} columns", allowed=f"1 to {MAX_OUTPUTS}")
        elif not integers:
            raise file.refuse(f"/{name}", f"shape {shape} of {dtype.name}", allowed="(N,) integers")


def _modalities(file: Container, num_samples: int) -> dict[str, StoredModality]:
    group = file.group(file.root, "modalities", "/modalities")
    names = file.links(group, "/modalities")
    if not 1 <= len(names) <= MAX_MODALITIES:
        raise file.refuse("/modalities", f"{len(names)} modalities", allowed=f"1 to {MAX_MODALITIES}")
    for name in names:
        if not NAME.fullmatch(name):
            raise file.refuse("/modalities", f"a modality named {printable(name)!r}", allowed=NAME.pattern)
    with collected() as errors:
        found = {name: errors.run(_modality, file, group, name, num_samples) for name in names}
    return {name: modality for name, modality in found.items() if modality is not None}


def _modality(file: Container, parent: Any, name: str, num_samples: int) -> StoredModality:
    place = f"/modalities/{name}"
    group = file.group(parent, name, place)
    attributes = file.attributes(group, place)
    names = file.links(group, place)
    form = _form(file, place, attributes, names)
    needed, optional = _PARTS[form]
    found = {n: file.dataset(group, n, f"{place}/{n}") for n in names if n in needed + optional}
    missing = [part for part in needed if part not in found]
    if missing:
        raise file.refuse(
            place, f"no dataset {', '.join(missing)}", allowed=f"{form} modalities have {', '.join(needed)}"
        )
    parts = {part: dataset.storage for part, dataset in found.items()}
    for part, dataset in found.items():
        _check_part(file, dataset, form=form, part=part, num_samples=num_samples)
    info = _info(file, name, place, form=form, parts=parts, attributes=attributes)
    return StoredModality(info, form, parts, attributes)


def _form(file: Container, place: str, attributes: Mapping[str, Attribute], names: list[str]) -> Form:
    kind = attributes.get("kind")
    if not isinstance(kind, str) or not NAME.fullmatch(kind):
        raise file.refuse(
            f"{place}@kind", f"{printable(kind)!r}", allowed="the name of a kind: image, timeseries, text ..."
        )
    if kind in ("text", "tabular"):
        return "text" if kind == "text" else "tabular"
    ragged = "offsets" in names
    if bool(attributes.get("ragged", ragged)) != ragged:
        found = f"ragged is {attributes['ragged']}, and offsets are {'there' if ragged else 'not there'}"
        raise file.refuse(f"{place}@ragged", found, allowed="true with offsets, false without")
    return "ragged" if ragged else "fixed"


def _check_part(file: Container, dataset: StoredDataset, *, form: Form, part: str, num_samples: int) -> None:
    shape, dtype, place = dataset.storage.shape, dataset.storage.dtype, dataset.storage.name
    rows = {"offsets": num_samples + 1, "data": None if form == "ragged" else num_samples}.get(part, num_samples)
    types = {"offsets": "i", "present": "b", "crc32": "i", "num": "f", "cat": "i"}.get(part, "iuf")
    axes = {"num": 2, "cat": 2, "data": 1 if form == "text" else None}.get(part, 1)
    right_type = dataset.text if (form, part) == ("text", "data") else not dataset.text and dtype.kind in types
    if rows is not None and shape[0] != rows:
        raise file.refuse(place, f"{shape[0]} rows", allowed=f"{rows}")
    if not right_type or (axes is not None and len(shape) != axes):
        found = f"{len(shape)} axes of {'text' if dataset.text else dtype.name}"
        wanted = "variable-length text" if (form, part) == ("text", "data") else f"numbers of kind {types}"
        raise file.refuse(place, found, allowed=f"{wanted}{'' if axes is None else f', {axes} axes'}")


def _info(
    file: Container,
    name: str,
    place: str,
    *,
    form: Form,
    parts: Mapping[str, Storage],
    attributes: Mapping[str, Attribute],
) -> ModalityInfo:
    rate = attributes.get("rate_hz")
    if rate is not None and not (isinstance(rate, int | float) and 0 < rate < float("inf")):
        raise file.refuse(f"{place}@rate_hz", f"{printable(rate)!r}", allowed="samples or frames a second, above 0")
    columns = {
        key: json_names(file, attributes, key, place) for key in ("channels", "columns", "num_names", "cat_names")
    }
    sizes = json_list(file, attributes, "cat_sizes", place, int)
    if form == "tabular":
        widths = {part: parts[part].shape[1] for part in ("num", "cat")}
        wrong = len(sizes) != widths["cat"] or any(n < 1 for n in sizes)
        for part, key in (("num", "num_names"), ("cat", "cat_names")):
            columns[key] = columns[key] or tuple(f"{part}{i}" for i in range(widths[part]))
            wrong = wrong or len(columns[key]) != widths[part]
        if wrong:
            found = (
                f"{len(columns['num_names'])} num_names, {len(columns['cat_names'])} cat_names, {len(sizes)} cat_sizes"
            )
            raise file.refuse(
                place, found, allowed=f"one for each column: {widths['num']} numbers, {widths['cat']} categories"
            )
    text = {key: str(attributes[key]) if key in attributes else None for key in ("layout", "unit")}
    data = parts.get("data")
    return ModalityInfo(
        name=name,
        kind=str(attributes["kind"]),
        ragged=form in ("ragged", "text"),
        shape=data.shape[1:] if data is not None else (),
        dtype="text" if form == "text" else value_dtype(data).name if data is not None else "float32",
        layout=text["layout"],
        rate_hz=None if rate is None else float(rate),
        unit=text["unit"],
        channels=columns["channels"] or columns["columns"],
        num_names=columns["num_names"] if form == "tabular" else (),
        cat_names=columns["cat_names"] if form == "tabular" else (),
        cat_sizes=tuple(sizes),
    )


def value_dtype(storage: Storage) -> np.dtype[Any]:
    """The type in which values are handed out: every float as float32, integers as they are stored."""
    return np.dtype(np.float32) if storage.dtype.kind == "f" else storage.dtype.newbyteorder("=")


def json_names(file: Container, attributes: Mapping[str, Attribute], key: str, place: str) -> tuple[str, ...]:
    """The list of texts in the JSON attribute `key`, empty where it is absent."""
    return tuple(json_list(file, attributes, key, place, str))


def json_list(file: Container, attributes: Mapping[str, Attribute], key: str, place: str, kind: type[Any]) -> list[Any]:
    """The list of `kind` in the JSON attribute `key`, empty where it is absent. DataError: anything else."""
    if key not in attributes:
        return []
    try:
        values = json.loads(str(attributes[key]))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        found = printable(attributes[key])
        raise file.refuse(f"{place}@{key}", f"{found!r}", allowed=f"a JSON list of {kind.__name__}")
    return values
