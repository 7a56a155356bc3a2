"""A data file, read sample by sample. Opening checks everything but the data; the data is checked when it is read."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from moemm.data.cache import ArrayCache
from moemm.data.catalogue import NO_SPLIT, SPLITS, ModalityInfo, TargetKind
from moemm.data.layout import Layout, StoredModality, load_layout, value_dtype
from moemm.data.limits import CACHE_BYTES, MAX_OUTPUTS, MAX_ROW_BYTES, collected, printable, refusal, size
from moemm.data.storage import Storage
from moemm.data.value import Table, Value
from moemm.errors import DataError

_METRICS: dict[TargetKind, str] = {"classification": "accuracy", "multilabel": "map", "regression": "mae"}
_REWRITE = "correct it and write the file again with moemm.data.write_file"
_BLOCK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelInfo:
    """A target of a file. outputs: classes, or target columns."""

    name: str
    target: TargetKind
    outputs: int
    class_names: tuple[str, ...]
    metric: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a file says about itself."""

    format: str
    task: str
    licence: str
    pairing: str
    honesty: str
    sources: tuple[str, ...]
    num_samples: int
    num_bytes: int
    labels: dict[str, LabelInfo]
    ignored: tuple[str, ...]


class DataFile:
    """A file in moemm's format, opened read-only; use it as a context manager. `read(name, i)` gives one value.

    labelled: refuse a file without labels or /split, which can be predicted and nothing else.
    It may be used after a fork. Raises DataError, naming file, object, what was found and what is allowed, for
    whatever is broken or hostile; nothing outside the file is ever read.
    """

    def __init__(self, path: str | os.PathLike[str], *, cache_bytes: int = CACHE_BYTES, labelled: bool = True) -> None:
        self.path = os.fspath(path)
        self._layout: Layout = load_layout(self.path, labelled=labelled)
        self._cache = ArrayCache(self.path, cache_bytes=cache_bytes)
        try:
            self._present: dict[str, np.ndarray] = {}
            self._quick: dict[str, Callable[[int], Value | None] | None] = {}
            self._read_columns()
            self.info = self._info()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return self._layout.num_samples

    def close(self) -> None:
        """Closes the file; reading afterwards is a DataError."""
        self._quick = {}
        self._cache.close()

    @property
    def modalities(self) -> tuple[ModalityInfo, ...]:
        """The modalities, in alphabetical order."""
        return tuple(modality.info for modality in self._layout.modalities.values())

    @property
    def layout(self) -> Layout:
        """Names, shapes, types and attributes of everything in the file."""
        return self._layout

    @property
    def has_split(self) -> bool:
        """Whether it says which split each sample is in; else `split` is full of NO_SPLIT."""
        return self._layout.split is not None

    def targets(self, label: str = "label") -> np.ndarray:
        """Targets of all samples: (N,) int64 classes, (N, C) float32 multilabel, (N,) or (N, C) float32 numbers."""
        if label not in self._targets:
            have = ", ".join(self._targets)
            raise self._refuse("/", f"no label {printable(label)!r}", allowed=have, do=f"set label to one of: {have}")
        return self._targets[label]

    def bags(self, name: str) -> np.ndarray:
        """(N,) int64 from 0 on, the same number for samples of equal value in `group` or in a label of classes.

        Raises DataError: the file has no such data set of whole numbers.
        """
        columns = {label: values for label, values in self._targets.items() if values.dtype == np.int64}
        if self.group is not None:
            columns["group"] = self.group
        if name not in columns:
            have = ", ".join(sorted(columns)) or "none of this file's data sets"
            do = f"set bags to one of: {have}" if columns else "write the file again with `group`"
            raise self._refuse("/", f"no data set {printable(name)!r} of whole numbers", allowed=have, do=do)
        return np.unique(columns[name], return_inverse=True)[1].astype(np.int64)

    def lengths(self, name: str) -> np.ndarray:
        """(N,) int64: rows of a ragged modality, UTF-8 bytes of a text, 1 or 0 (absent) for others."""
        modality = self._modality(name)
        if modality.form == "ragged":
            return np.diff(self._offsets[name])
        if modality.form == "text":
            return self.column(modality.parts["data"])["length"].astype(np.int64)
        return self.present(name).astype(np.int64)

    def present(self, name: str) -> np.ndarray:
        """(N,) bool: which samples have the modality."""
        if name not in self._present:
            modality = self._modality(name)
            if modality.form == "fixed":
                stored = modality.parts.get("present")
                self._present[name] = np.ones(len(self), bool) if stored is None else self.column(stored)
            else:
                self._present[name] = self._filled(modality) if modality.form == "tabular" else self.lengths(name) > 0
        return self._present[name]

    def read(self, name: str, index: int) -> Value | None:
        """Modality `name` of sample `index`, None where the sample lacks it.

        Arrays: fixed (...), ragged (T, ...); floats as float32, integers as stored, always a copy. Others: str, Table.
        Raises DataError: no such modality or sample, broken bytes.
        """
        quick = self._quick.get(name)
        if quick is not None and 0 <= index < self._layout.num_samples:
            return quick(index)
        modality = self._modality(name)
        if not 0 <= index < len(self):
            raise self._refuse("/", f"no sample {index}", allowed=f"0 to {len(self) - 1}", do="check the index")
        value = self._read(modality, index)
        if value is not None and name not in self._quick:
            self._quick[name] = self._quick_reader(modality)
        return value

    def _read(self, modality: StoredModality, index: int) -> Value | None:
        if modality.form == "text":
            return self._text(modality, index) or None
        if modality.form == "tabular":
            return self._record(modality, index)
        data = modality.parts["data"]
        if modality.form == "fixed":
            here = "present" not in modality.parts or self.present(modality.info.name)[index]
            return np.array(self._cache.rows(data, index, index + 1)[0], value_dtype(data)) if here else None
        start, stop = self._offsets[modality.info.name][index : index + 2].tolist()
        return self._cache.rows(data, start, stop).astype(value_dtype(data)) if stop > start else None

    def _quick_reader(self, modality: StoredModality) -> Callable[[int], Value | None] | None:
        """What gives the same values with everything looked up; None where the arrays are not kept decoded."""
        name, parts = modality.info.name, modality.parts
        if modality.form == "text":
            return None
        wanted = ("num", "cat") if modality.form == "tabular" else ("data",)
        kept = [array for part in wanted if (array := self._cache.kept(parts[part])) is not None]
        if len(kept) < len(wanted):
            return None
        if modality.form == "ragged":
            return partial(_rows, kept[0], value_dtype(parts["data"]), self._offsets[name])
        here = self.present(name)
        if modality.form == "fixed":
            return partial(_row, kept[0], value_dtype(parts["data"]), here)
        num, cat = kept
        if ((cat < 0) | (cat >= np.array(modality.info.cat_sizes))).any():
            return None  # `_record` says where
        return partial(_table, num, cat, here)

    def sample(self, index: int) -> dict[str, Value]:
        """All modalities that sample `index` has, by name."""
        values = {name: self.read(name, index) for name in self._layout.modalities}
        return {name: value for name, value in values.items() if value is not None}

    def scan(self, storage: Storage) -> None:
        """Decodes every byte of one stored array. DataError: a broken one."""
        self._cache.scan(storage)

    def _modality(self, name: str) -> StoredModality:
        try:
            return self._layout.modalities[name]
        except KeyError:
            have = ", ".join(self._layout.modalities)
            found = f"no modality {printable(name)!r}"
            raise self._refuse("/modalities", found, allowed=have, do="use one of these names") from None

    def column(self, storage: Storage) -> np.ndarray:
        """All rows of one stored array, as stored. May be a read-only view; DataError: broken bytes."""
        return self._cache.rows(storage, 0, storage.shape[0])

    def _read_columns(self) -> None:
        """Everything that is small: one or a few numbers a sample."""
        labels = self._layout.labels.items()
        ragged = [(name, m) for name, m in self._layout.modalities.items() if m.form == "ragged"]
        with collected() as errors:
            self.split: np.ndarray = errors.run(self._split)
            self.group = None if self._layout.group is None else errors.run(self.column, self._layout.group)
            self._targets: dict[str, np.ndarray] = {name: errors.run(self._target, storage) for name, storage in labels}
            self._offsets: dict[str, np.ndarray] = {
                name: errors.run(self._offset, modality) for name, modality in ragged
            }

    def _split(self) -> np.ndarray:
        if self._layout.split is None:
            return np.full(len(self), NO_SPLIT, np.uint8)
        split = self.column(self._layout.split)
        wrong = np.flatnonzero((split < 0) | (split >= len(SPLITS)))
        if wrong.size:
            found = f"value {split[wrong[0]]} at sample {wrong[0]} ({wrong.size} such)"
            allowed = ", ".join(f"{number} {name}" for name, number in SPLITS.items())
            raise self._refuse("/split", found, allowed=allowed, do=_REWRITE)
        return split.astype(np.uint8)

    def _target(self, storage: Storage) -> np.ndarray:
        values = self.column(storage)
        if values.ndim == 1 and values.dtype.kind in "iu":
            wrong = np.asarray(values < 0)
        elif values.dtype.kind == "u":
            wrong = np.asarray((values > 1).any(axis=1))
        else:
            wrong = np.asarray(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if wrong.any():
            index = int(np.flatnonzero(wrong)[0])
            found = f"target {values[index]} of sample {index} ({int(wrong.sum())} such)"
            allowed = "classes from 0 on, multilabel 0 or 1, finite numbers"
            raise self._refuse(storage.name, found, allowed=allowed, do=_REWRITE)
        return values.astype(np.int64 if values.ndim == 1 and values.dtype.kind in "iu" else np.float32)

    def _offset(self, modality: StoredModality) -> np.ndarray:
        storage, data = modality.parts["offsets"], modality.parts["data"]
        offsets = self.column(storage).astype(np.int64)
        steps = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != data.shape[0] or (steps < 0).any():
            found = f"offsets from {offsets[0]} to {offsets[-1]}, smallest step {steps.min(initial=0)}"
            raise self._refuse(storage.name, found, allowed=f"from 0 to {data.shape[0]}, never falling", do=_REWRITE)
        longest = int(steps.max(initial=0)) * data.row_bytes
        if longest > MAX_ROW_BYTES:
            raise self._refuse(
                data.name, f"a sample of {size(longest)}", allowed=f"up to {size(MAX_ROW_BYTES)}", do=_REWRITE
            )
        return offsets

    def _text(self, modality: StoredModality, index: int) -> str:
        data = modality.parts["data"]
        try:
            raw = self._cache.heap.read(self._cache.rows(data, index, index + 1)[0])
            if "crc32" in modality.parts and self._cache.rows(modality.parts["crc32"], index, index + 1)[
                0
            ] != zlib.crc32(raw):
                raise ValueError("the text does not fit its checksum: bytes were changed after writing")
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"sample {index}: text that is not UTF-8 ({error.reason} at byte {error.start})"
        except (ValueError, OSError) as error:
            found = f"sample {index}: {error}"
        raise self._refuse(data.name, found, allowed="UTF-8 text, intact", do="fetch the file again, or write it again")

    def _record(self, modality: StoredModality, index: int) -> Table | None:
        num, cat = (self._cache.rows(modality.parts[part], index, index + 1)[0] for part in ("num", "cat"))
        if np.isnan(num).all() and not cat.any():
            return None
        for column, (value, limit) in enumerate(zip(cat.tolist(), modality.info.cat_sizes, strict=True)):
            if not 0 <= value < limit:
                found = f"sample {index}: category {value} of {printable(modality.info.cat_names[column])}"
                allowed = f"0 (missing) to {limit - 1}"
                raise self._refuse(modality.parts["cat"].name, found, allowed=allowed, do=_REWRITE)
        return Table(num.astype(np.float32), cat.astype(np.int32))

    def _filled(self, modality: StoredModality) -> np.ndarray:
        num, cat = modality.parts["num"], modality.parts["cat"]
        filled = np.zeros(len(self), bool)
        rows = max(1, _BLOCK_BYTES // max(num.row_bytes + cat.row_bytes, 1))
        for start in range(0, len(self), rows):
            self._fill(filled, modality, start, min(start + rows, len(self)))
        return filled

    def _fill(self, filled: np.ndarray, modality: StoredModality, start: int, stop: int) -> None:
        """Of the rows `start` to `stop`. A broken row is there: whoever reads it is told that it is broken."""
        try:
            num, cat = (self._cache.rows(modality.parts[part], start, stop) for part in ("num", "cat"))
            filled[start:stop] = (~np.isnan(num)).any(axis=1) | cat.any(axis=1)
        except DataError:
            if stop - start == 1:
                filled[start] = True
                return
            middle = (start + stop) // 2
            self._fill(filled, modality, start, middle)
            self._fill(filled, modality, middle, stop)

    def _info(self) -> FileInfo:
        attributes = self._layout.attributes
        labels = {name: self._label(name, self._layout.class_names[name]) for name in self._targets}
        text = {key: str(attributes.get(key, "")) for key in ("format", "task", "licence", "pairing", "honesty")}
        return FileInfo(
            **text,
            sources=self._layout.sources,
            num_samples=len(self),
            num_bytes=self._layout.num_bytes,
            labels=labels,
            ignored=self._layout.ignored,
        )

    def _label(self, name: str, class_names: tuple[str, ...]) -> LabelInfo:
        values, attributes = self._targets[name], self._layout.of_label(name)
        if values.dtype == np.int64:
            target: TargetKind = "classification"
            outputs = self._num_classes(name, attributes.get("n_classes", len(class_names) or None), class_names)
        else:
            target = "multilabel" if self._layout.labels[name].dtype.kind == "u" else "regression"
            outputs = values.shape[1] if values.ndim == 2 else 1
        metric = str(attributes.get("metric", _METRICS[target]))
        return LabelInfo(name=name, target=target, outputs=outputs, class_names=class_names, metric=metric)

    def _num_classes(self, name: str, declared: Any, class_names: tuple[str, ...]) -> int:
        largest = int(self._targets[name].max(initial=0))
        count = largest + 1 if declared is None else declared
        if not isinstance(count, int) or not largest < count <= MAX_OUTPUTS:
            found = f"labels up to {largest} with n_classes {printable(count)}"
            allowed = f"labels from 0 to n_classes - 1, n_classes up to {MAX_OUTPUTS}"
            raise self._refuse(f"/{name}", found, allowed=allowed, do=_REWRITE)
        if class_names and len(class_names) != count:
            found = f"{len(class_names)} class_names for {count} classes"
            raise self._refuse(f"/{name}", found, allowed="one name for each class", do=_REWRITE)
        return count

    def _refuse(self, place: str, found: str, *, allowed: str, do: str) -> DataError:
        return refusal(self.path, place, found, allowed=allowed, do=do)


# What `DataFile.read` gives of arrays that are kept; no methods, so that no file is held by what it holds.
def _row(data: np.ndarray, dtype: np.dtype[Any], here: np.ndarray, index: int) -> np.ndarray | None:
    return np.array(data[index], dtype) if here[index] else None


def _rows(data: np.ndarray, dtype: np.dtype[Any], offsets: np.ndarray, index: int) -> np.ndarray | None:
    start, stop = offsets[index], offsets[index + 1]
    return data[start:stop].astype(dtype) if stop > start else None


def _table(num: np.ndarray, cat: np.ndarray, here: np.ndarray, index: int) -> Table | None:
    return Table(num[index].astype(np.float32), cat[index].astype(np.int32)) if here[index] else None
