"""What is in a file, as tables for a person."""

from __future__ import annotations

import os

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from moemm.data.catalogue import SPLITS, ModalityInfo
from moemm.data.classes import class_counts, class_name
from moemm.data.file import DataFile, LabelInfo
from moemm.data.limits import printable, size

_MAX_CLASSES = 30


def inspect_file(path: str | os.PathLike[str]) -> RenderableType:
    """Description, modalities and labels of a file, to print with rich. DataError: a broken or hostile file."""
    with DataFile(path, labelled=False) as file:
        labels = [part for label in file.info.labels.values() for part in _label_parts(file, label)]
        return Group(_facts(file), "", _modality_grid(file), *labels)


def _facts(file: DataFile) -> Grid:
    info = file.info
    grid = Grid.grid(padding=(0, 2))
    splits = ", ".join(
        f"{name} {int((file.split == n).sum())}" for name, n in SPLITS.items() if (file.split == n).any()
    )
    groups = "" if file.group is None else f", {len(np.unique(file.group))} groups"
    rows = {
        "file": f"{file.path} ({size(info.num_bytes)}, format {info.format})",
        "task": info.task,
        "samples": f"{info.num_samples}: {splits or 'no split'}{groups}",
        "labels": "" if info.labels else "none: it can be predicted, not trained on",
        "licence": info.licence,
        "sources": ", ".join(info.sources),
        "pairing": info.pairing,
        "honesty": info.honesty,
        "ignored": ", ".join(info.ignored),
    }
    for key, value in rows.items():
        if value:
            grid.add_row(Text(key, style="bold"), Text(printable(value, limit=1000)))
    return grid


def _modality_grid(file: DataFile) -> Grid:
    grid = Grid()
    for name in ("name", "kind", "shape", "type", "length min / median / max", "rate", "missing"):
        grid.add_column(name, justify="right" if name in ("missing", "rate") else "left")
    for info in file.modalities:
        missing = 1.0 - float(file.present(info.name).mean())
        cells = [info.name, info.kind, _shape(info), info.dtype, _lengths(file, info), _rate(info), f"{missing:.1%}"]
        grid.add_row(*(Text(printable(cell)) for cell in cells))
    return grid


def _shape(info: ModalityInfo) -> str:
    if info.kind == "tabular":
        return f"{len(info.num_names)} numbers, {len(info.cat_names)} categories"
    shape = " x ".join(map(str, info.shape))
    if info.kind == "text":
        return ""
    return f"T x {shape}".removesuffix(" x ") if info.ragged else shape


def _lengths(file: DataFile, info: ModalityInfo) -> str:
    if not info.ragged:
        return ""
    lengths = file.lengths(info.name)
    lengths = lengths[lengths > 0]
    if not lengths.size:
        return ""
    unit = " bytes" if info.kind == "text" else ""
    return f"{lengths.min()} / {np.median(lengths):.0f} / {lengths.max()}{unit}"


def _rate(info: ModalityInfo) -> str:
    return "" if info.rate_hz is None else f"{info.rate_hz:g} Hz"


def _label_parts(file: DataFile, label: LabelInfo) -> list[RenderableType]:
    outputs = {"classification": "classes", "multilabel": "labels", "regression": "columns"}[label.target]
    title = f"{label.name}: {label.target}, {label.outputs} {outputs}, metric {label.metric}; share of each split"
    return ["", Text(printable(title), style="bold"), _label_grid(file, label)]


def _label_grid(file: DataFile, label: LabelInfo) -> Grid:
    values = file.targets(label.name)
    grid = Grid()
    splits = [name for name, number in SPLITS.items() if (file.split == number).any()]
    grid.add_column("target" if label.target == "regression" else "class")
    for name in splits:
        grid.add_column(name, justify="right")
    for name, cells in _label_rows(file, label, values, splits)[:_MAX_CLASSES]:
        grid.add_row(Text(printable(name, limit=40)), *cells)
    if label.outputs > _MAX_CLASSES:
        grid.add_row(f"and {label.outputs - _MAX_CLASSES} more")
    return grid


def _label_rows(file: DataFile, label: LabelInfo, values: np.ndarray, splits: list[str]) -> list[tuple[str, list[str]]]:
    parts = [file.split == SPLITS[name] for name in splits]
    if label.target == "regression":
        columns = values.reshape(len(values), -1).T
        cells = [[f"{c[part].mean():.4g} \u00b1 {c[part].std():.3g}" for part in parts] for c in columns]
    else:
        counts = class_counts(values, file.split, outputs=label.outputs)
        numbers = [SPLITS[name] for name in splits]
        totals = np.array([max(int(part.sum()), 1) for part in parts])
        cells = [[f"{share:.1%}" for share in counts[numbers, c] / totals] for c in range(label.outputs)]
    names = [
        class_name(label.class_names, i) if label.target != "regression" else f"column {i}" for i in range(len(cells))
    ]
    return list(zip(names, cells, strict=True))
