"""Reads everything in a file and tells all that is wrong with it at once: errors that stop a run, and warnings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from moemm.data.catalogue import SPLITS
from moemm.data.classes import class_counts, class_name, unseen_classes
from moemm.data.cost import costly_arrays
from moemm.data.file import DataFile, LabelInfo
from moemm.data.limits import printable
from moemm.data.value import Table, Value
from moemm.errors import DataError

_SHOWN = 5


@dataclass(slots=True)
class Report:
    """What was found in a file: errors stop a run, warnings deserve a look, facts are counts."""

    path: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """No errors."""
        return not self.errors

    @property
    def lines(self) -> list[str]:
        """The report as plain text, one finding an entry, errors first."""
        found = [f"error: {text}" for text in self.errors] + [f"warning: {text}" for text in self.warnings]
        return [*found, *self.facts]


def validate_file(path: str | os.PathLike[str]) -> Report:
    """Reads every byte of a data file and reports all problems. Never raises DataError: it becomes the report."""
    report = Report(os.fspath(path))
    try:
        with DataFile(path, labelled=False) as file:
            _check_splits(file, report)
            for label in file.info.labels.values():
                _check_label(file, label, report)
            _check_groups(file, report)
            _check_integrity(file, report)
            report.warnings += costly_arrays(file.layout)
            values = _Values(file, report)
            values.read()
            _check_duplicates(file, values, report)
            report.warnings += values.remarks()
            counts = ", ".join(f"{name} {int((file.split == n).sum())}" for name, n in SPLITS.items())
            counts = counts if file.has_split else "no split"
            report.facts.append(f"{len(file)} samples ({counts}), {len(file.modalities)} modalities, all values read")
    except DataError as error:
        report.errors.append(str(error))
    return report


def _check_splits(file: DataFile, report: Report) -> None:
    for what, there in (("labels", bool(file.info.labels)), ("split", file.has_split)):
        if not there:
            report.warnings.append(f"/: no {what}; such a file can be predicted (moemm predict), not trained on")
    for name in ("train", "val", "test") if file.has_split else ():
        if not (file.split == SPLITS[name]).any():
            target = report.warnings if name == "test" else report.errors
            target.append(f"/split: no sample of split {name} ({SPLITS[name]})")
    if file.info.ignored:
        report.warnings.append(f"/: not part of the format, never read: {_some(map(printable, file.info.ignored))}")
    for key in ("licence", "pairing"):
        if not getattr(file.info, key):
            report.warnings.append(f"/@{key}: empty; say it, so that results can be judged")


def _check_label(file: DataFile, label: LabelInfo, report: Report) -> None:
    if label.target == "regression":
        return
    targets = file.targets(label.name)
    unseen = unseen_classes(label, targets, file.split)
    if unseen:
        report.errors.append(f"/{label.name}: no training sample of {unseen}")
    counts = class_counts(targets, file.split, outputs=label.outputs)
    names = [printable(class_name(label.class_names, i)) for i in range(label.outputs)]
    never = np.flatnonzero(counts.sum(axis=0) == 0)
    if never.size:
        report.warnings.append(f"/{label.name}: classes without any sample: {_some(names[i] for i in never)}")


def _check_groups(file: DataFile, report: Report) -> None:
    if file.group is None:
        return
    groups = {name: set(file.group[file.split == number].tolist()) for name, number in SPLITS.items()}
    for name in ("val", "test"):
        both = sorted(groups["train"] & groups[name])
        if both and len(set().union(*groups.values())) > 1:
            report.warnings.append(f"/group: {len(both)} group(s) are in train and in {name}: {_some(map(str, both))}")


def _check_integrity(file: DataFile, report: Report) -> None:
    unchecked = []
    for storage in file.layout.storages():
        try:
            file.scan(storage)
        except DataError as error:
            report.errors.append(str(error))
        if storage.num_bytes and not storage.checked:
            unchecked.append(storage.name)
    for modality in file.layout.modalities.values():
        if modality.form == "text" and "crc32" not in modality.parts:
            unchecked.append(f"texts of {modality.info.name}")
    if unchecked:
        report.warnings.append(
            f"stored without a checksum, so changed bytes would go unnoticed: {_some(unchecked)}; "
            "`moemm data repack OLD NEW` adds them"
        )


class _Values:
    """One pass over all samples: hashes, missing shares, NaN shares and constant columns."""

    def __init__(self, file: DataFile, report: Report) -> None:
        self.file, self.report = file, report
        self.digests: dict[int, bytes] = {}
        self._nan: dict[str, int] = {}
        self._size: dict[str, int] = {}
        self._low: dict[str, np.ndarray] = {}
        self._high: dict[str, np.ndarray] = {}

    def read(self) -> None:
        """Reads everything; one error for each modality that cannot be read, and one for samples without any."""
        broken: set[str] = set()
        lacking = []
        for index in range(len(self.file)):
            digest = hashlib.blake2b(digest_size=16)
            found = False
            for info in self.file.modalities:
                if info.name in broken:
                    continue
                try:
                    value = self.file.read(info.name, index)
                except DataError as error:
                    broken.add(info.name)
                    self.report.errors.append(str(error))
                    continue
                if value is not None:
                    found = True
                    self._note(info.name, value, digest)
            self.digests[index] = digest.digest()
            if not found and not broken:
                lacking.append(index)
        if lacking:
            self.report.errors.append(
                f"{len(lacking)} sample(s) without any modality: index {_some(map(str, lacking))}"
            )

    def _note(self, name: str, value: Value, digest: hashlib.blake2b) -> None:
        digest.update(name.encode() + b"\0")
        if isinstance(value, str):
            digest.update(value.encode())
            return
        for part in value if isinstance(value, Table) else (value,):
            digest.update(np.ascontiguousarray(part).tobytes())
        numbers = value.num if isinstance(value, Table) else value
        if numbers.size:
            self._measure(name, numbers.reshape(-1, numbers.shape[-1]) if numbers.ndim > 1 else numbers.reshape(1, -1))

    def _measure(self, name: str, rows: np.ndarray) -> None:
        finite = np.isfinite(rows)
        self._nan[name] = self._nan.get(name, 0) + rows.size - int(finite.sum())
        self._size[name] = self._size.get(name, 0) + rows.size
        low = np.where(finite, rows, np.inf).min(axis=0)
        high = np.where(finite, rows, -np.inf).max(axis=0)
        if name in self._low and self._low[name].shape != low.shape:
            low, high = low.min(keepdims=True), high.max(keepdims=True)
            self._low[name], self._high[name] = self._low[name].min(keepdims=True), self._high[name].max(keepdims=True)
        self._low[name] = np.minimum(self._low.get(name, low), low)
        self._high[name] = np.maximum(self._high.get(name, high), high)

    def remarks(self) -> Iterator[str]:
        """Warnings about values."""
        for info in self.file.modalities:
            if self._nan.get(info.name):
                share = self._nan[info.name] / self._size[info.name]
                yield f"{info.name}: {share:.2%} of the numbers are NaN or infinite (NaN means missing)"
            if info.name in self._low and info.kind not in ("image", "video"):
                constant = np.flatnonzero(self._high[info.name] <= self._low[info.name])
                if constant.size:
                    names = info.num_names or info.channels
                    listed = _some(names[i] if i < len(names) else f"column {i}" for i in constant)
                    yield f"{info.name}: constant or empty, so nothing to learn from: {listed}"
            missing = int((~self.file.present(info.name)).sum())
            if missing:
                yield f"{info.name}: {missing} of {len(self.file)} samples lack it ({missing / len(self.file):.1%})"


def _check_duplicates(file: DataFile, values: _Values, report: Report) -> None:
    seen: dict[bytes, set[int]] = {}
    for index, digest in values.digests.items():
        seen.setdefault(digest, set()).add(index)
    for name in ("val", "test"):
        number = SPLITS[name]
        doubled = [
            f"{min(i for i in same if file.split[i] == 0)} = {min(i for i in same if file.split[i] == number)}"
            for same in seen.values()
            if len(same) > 1 and {0, number} <= set(file.split[list(same)].tolist())
        ]
        if doubled:
            report.warnings.append(
                f"{len(doubled)} sample(s) of {name} are also in train (train = {name}): {_some(doubled)}"
            )


def _some(items: Iterable[str]) -> str:
    """The first few of `items`, joined."""
    listed = list(items)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")
