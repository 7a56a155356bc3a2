"""Writes files in moemm's format: gzip and checksums on everything, rows together, and read back before they count."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moemm.data.file import DataFile, FileInfo
from moemm.data.hdf5 import Attribute, Node, write_tree
from moemm.data.layout import FORMAT
from moemm.data.limits import KIB
from moemm.data.value import Table
from moemm.errors import DataError

_CHUNK_BYTES = 64 * KIB
"""Where an array is not kept decoded, a sample costs a chunk: benchmarks/reading.py."""
_LONGEST_ATTRIBUTE = 60 * KIB

Column = np.ndarray | Sequence[np.ndarray | None] | Sequence[str | None] | Table


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalityData:
    """One modality of all samples, to write.

    values, by the shape of the modality:
        fixed: an array (N, ...), or a list of N equal shapes; None in the list: the sample lacks the modality.
        ragged: a list of N arrays (T_i, ...); None or length 0: absent. Equal lengths need ragged=True.
        text (kind "text"): a list of N texts; None or "": absent.
        tabular (kind "tabular"): a Table of num (N, Dn) and cat (N, Dc); all NaN and all 0: absent.
    attributes: anything else to note: one text, number or bool each.
    """

    kind: str
    values: Column
    ragged: bool | None = None
    layout: str | None = None
    rate_hz: float | None = None
    unit: str | None = None
    channels: Sequence[str] = ()
    num_names: Sequence[str] = ()
    cat_names: Sequence[str] = ()
    cat_sizes: Sequence[int] = ()
    attributes: Mapping[str, Attribute] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelData:
    """One target of all samples, to write.

    values: (N,) int64 classes, (N, C) uint8 multilabel, (N,) or (N, C) float32 numbers.
    """

    values: np.ndarray
    class_names: Sequence[str] = ()
    metric: str | None = None


def write_file(
    path: str | os.PathLike[str],
    *,
    task: str,
    modalities: Mapping[str, ModalityData],
    labels: Mapping[str, LabelData] | np.ndarray | None = None,
    split: np.ndarray | None = None,
    group: np.ndarray | None = None,
    class_names: Sequence[str] = (),
    metric: str | None = None,
    licence: str = "",
    pairing: str = "",
    honesty: str = "",
    sources: Sequence[str] = (),
) -> FileInfo:
    """Writes a data file and reads it back; the file appears at `path` only when that worked.

    labels: the targets, or several: {"label": ..., "label_<aux>": ...}. class_names and metric describe `label`.
    split: (N,) 0 train, 1 val, 2 test, 3 out of domain. group: (N,) subject or item that must not straddle splits.
    A file without labels, or without a split, can be predicted (`moemm predict`) and not trained on.
    Raises DataError: anything that the reader would refuse.
    """
    labelled = labels is not None and split is not None
    if labels is None:
        labels = {}
    if not isinstance(labels, Mapping):
        labels = {"label": LabelData(values=np.asarray(labels), class_names=class_names, metric=metric)}
    nodes = {"/": Node(attributes=_root(task, labels, licence, pairing, honesty, sources))}
    if split is not None:
        nodes["split"] = Node(np.asarray(split, np.uint8))
    if group is not None:
        nodes["group"] = Node(np.asarray(group, np.int32))
    for name, label in labels.items():
        nodes[name] = Node(_label_values(label.values), {} if name == "label" else _label_attributes(label))
    nodes["modalities"] = Node()
    for name, data in modalities.items():
        nodes |= _modality_nodes(f"modalities/{name}", data)
    return _commit(Path(path), nodes, labelled=labelled)


def _commit(path: Path, nodes: dict[str, Node], *, labelled: bool) -> FileInfo:
    for name, node in nodes.items():
        for key, value in node.attributes.items():
            if isinstance(value, str) and len(value.encode()) > _LONGEST_ATTRIBUTE:
                raise DataError(
                    f"{path}: attribute {key} of {name} has more than {_LONGEST_ATTRIBUTE} bytes; shorten it"
                )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_tree(partial, nodes, chunk_bytes=_CHUNK_BYTES)
        with DataFile(partial, labelled=labelled) as file:
            for index in range(len(file)):
                file.sample(index)
            info = file.info
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    except DataError as error:
        raise DataError(str(error).replace(str(partial), str(path))) from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return info


def _root(
    task: str, labels: Mapping[str, LabelData], licence: str, pairing: str, honesty: str, sources: Sequence[str]
) -> dict[str, Attribute]:
    texts = {"format": FORMAT, "task": task, "licence": licence, "pairing": pairing, "honesty": honesty}
    main = _label_attributes(labels["label"]) if "label" in labels else {}
    return {**texts, "sources": json.dumps(list(sources), ensure_ascii=False), **main}


def _label_values(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype.kind in "iub" and values.ndim == 1:
        return values.astype(np.int64)
    return values.astype(np.float32 if values.dtype.kind == "f" else np.uint8)


def _label_attributes(label: LabelData) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    if label.class_names:
        found["class_names"] = json.dumps(list(label.class_names), ensure_ascii=False)
        found["n_classes"] = len(label.class_names)
    if label.metric:
        found["metric"] = label.metric
    return found


def _modality_nodes(place: str, data: ModalityData) -> dict[str, Node]:
    attributes: dict[str, Attribute] = {**data.attributes, "kind": data.kind}
    for key in ("channels", "num_names", "cat_names", "cat_sizes"):
        values = getattr(data, key)
        if len(values) or (data.kind == "tabular" and key != "channels"):
            attributes[key] = json.dumps(list(values), ensure_ascii=False)
    for key in ("layout", "rate_hz", "unit"):
        if getattr(data, key) is not None:
            attributes[key] = getattr(data, key)
    parts = _parts(place, data)
    attributes["ragged"] = "offsets" in parts
    return {place: Node(None, attributes), **{f"{place}/{part}": Node(values) for part, values in parts.items()}}


def _parts(place: str, data: ModalityData) -> dict[str, np.ndarray | list[str]]:
    values = data.values
    if isinstance(values, Table):
        return {"num": np.asarray(values.num, np.float32), "cat": np.asarray(values.cat, np.int32)}
    if data.kind == "tabular":
        raise DataError(f"{place}: kind tabular takes a moemm.data.Table(num, cat), not {type(values).__name__}")
    if data.kind == "text":
        return _texts(place, [str(value or "") for value in values])
    if isinstance(values, np.ndarray) and not data.ragged:
        return {"data": values}
    rows = [None if value is None else np.asarray(value) for value in values]
    arrays = [row for row in rows if row is not None]
    if not arrays:
        raise DataError(f"{place}: every sample lacks it; leave the modality out")
    if data.ragged or (data.ragged is None and len({len(array) for array in arrays}) > 1):
        return _ragged(place, rows, arrays[0])
    return _fixed(place, rows, arrays[0])


def _texts(place: str, texts: list[str]) -> dict[str, np.ndarray | list[str]]:
    """HDF5 puts no checksum on variable-length text, so each text brings its own."""
    try:
        return {"data": texts, "crc32": np.array([zlib.crc32(text.encode()) for text in texts], np.int64)}
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: a text that cannot be written as UTF-8 ({error.reason})") from None


def _ragged(place: str, values: list[np.ndarray | None], example: np.ndarray) -> dict[str, np.ndarray | list[str]]:
    rows = [example[:0] if value is None else value for value in values]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    try:
        return {"data": np.concatenate(rows), "offsets": offsets}
    except ValueError as error:
        raise DataError(f"{place}: its samples differ in more than their first axis ({error})") from None


def _fixed(place: str, values: list[np.ndarray | None], example: np.ndarray) -> dict[str, np.ndarray | list[str]]:
    try:
        data = np.stack([np.zeros_like(example) if value is None else value for value in values])
    except ValueError as error:
        raise DataError(f"{place}: its samples differ in shape; set ragged=True ({error})") from None
    present = np.array([value is not None for value in values])
    return {"data": data} if present.all() else {"data": data, "present": present}
