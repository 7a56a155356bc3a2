"""Data files, catalogues of tasks and modalities, and batches without padding. Names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moemm.data.build import build_catalogue as build_catalogue
    from moemm.data.catalogue import SPLITS as SPLITS
    from moemm.data.catalogue import Catalogue as Catalogue
    from moemm.data.catalogue import ModalityInfo as ModalityInfo
    from moemm.data.catalogue import TaskInfo as TaskInfo
    from moemm.data.dataset import SplitDataset as SplitDataset
    from moemm.data.file import DataFile as DataFile
    from moemm.data.inspect import inspect_file as inspect_file
    from moemm.data.loader import BatchLoader as BatchLoader
    from moemm.data.loader import eval_loader as eval_loader
    from moemm.data.loader import train_loader as train_loader
    from moemm.data.mixture import MixtureSampler as MixtureSampler
    from moemm.data.pack import Packer as Packer
    from moemm.data.repack import repack_file as repack_file
    from moemm.data.sample import PackedBatch as PackedBatch
    from moemm.data.sample import PackedModality as PackedModality
    from moemm.data.sample import Prepare as Prepare
    from moemm.data.sample import Sample as Sample
    from moemm.data.validate import Report as Report
    from moemm.data.validate import validate_file as validate_file
    from moemm.data.value import Table as Table
    from moemm.data.value import Value as Value
    from moemm.data.writer import LabelData as LabelData
    from moemm.data.writer import ModalityData as ModalityData
    from moemm.data.writer import write_file as write_file

_HOMES = {
    "build_catalogue": "build",
    "Catalogue": "catalogue",
    "ModalityInfo": "catalogue",
    "SPLITS": "catalogue",
    "TaskInfo": "catalogue",
    "SplitDataset": "dataset",
    "DataFile": "file",
    "inspect_file": "inspect",
    "BatchLoader": "loader",
    "eval_loader": "loader",
    "train_loader": "loader",
    "MixtureSampler": "mixture",
    "Packer": "pack",
    "repack_file": "repack",
    "PackedBatch": "sample",
    "PackedModality": "sample",
    "Prepare": "sample",
    "Sample": "sample",
    "Report": "validate",
    "validate_file": "validate",
    "Table": "value",
    "Value": "value",
    "LabelData": "writer",
    "ModalityData": "writer",
    "write_file": "writer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
