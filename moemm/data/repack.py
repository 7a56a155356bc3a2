"""Writes a file again in the present format: gzip, checksums and whole rows in a chunk; every value stays as it is."""

from __future__ import annotations

import itertools
import os

import numpy as np

from moemm.data.file import DataFile, FileInfo
from moemm.data.layout import StoredModality
from moemm.data.value import Table
from moemm.data.writer import Column, LabelData, ModalityData, write_file

_DESCRIBED = {"kind", "ragged", "layout", "rate_hz", "unit", "channels", "num_names", "cat_names", "cat_sizes"}


def repack_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> FileInfo:
    """Reads `source` and writes it as `target` with moemm's writer. Needs the memory of the decoded file.

    Raises DataError: a source that is broken, a target that cannot be written.
    """
    with DataFile(source, labelled=False) as file:
        layout, info = file.layout, file.info
        labels = {
            name: LabelData(
                values=file.column(storage),
                class_names=info.labels[name].class_names,
                metric=layout.of_label(name).get("metric"),
            )
            for name, storage in layout.labels.items()
        }
        return write_file(
            target,
            task=info.task,
            labels=labels or None,
            split=file.split if file.has_split else None,
            group=file.group,
            modalities={name: _modality(file, modality) for name, modality in layout.modalities.items()},
            licence=info.licence,
            pairing=info.pairing,
            honesty=info.honesty,
            sources=info.sources,
        )


def _modality(file: DataFile, modality: StoredModality) -> ModalityData:
    info = modality.info
    return ModalityData(
        kind=info.kind,
        values=_values(file, modality),
        ragged=modality.form == "ragged",
        layout=info.layout,
        rate_hz=info.rate_hz,
        unit=info.unit,
        channels=info.channels if "channels" in modality.attributes else (),
        num_names=info.num_names,
        cat_names=info.cat_names,
        cat_sizes=info.cat_sizes,
        attributes={key: value for key, value in modality.attributes.items() if key not in _DESCRIBED},
    )


def _values(file: DataFile, modality: StoredModality) -> Column:
    parts = modality.parts
    if modality.form == "tabular":
        return Table(file.column(parts["num"]), file.column(parts["cat"]))
    if modality.form == "text":
        return [str(file.read(modality.info.name, i) or "") for i in range(len(file))]
    data = file.column(parts["data"])
    if modality.form == "ragged":
        offsets = np.concatenate([[0], np.cumsum(file.lengths(modality.info.name))])
        return [data[start:stop] for start, stop in itertools.pairwise(offsets)]
    present = file.present(modality.info.name)
    return data if present.all() else [row if here else None for row, here in zip(data, present, strict=True)]
