"""Real-shaped values of every built-in modality kind, and batches made of them: what the contract tests run on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from moemm.config.schema import ModalityConfig
from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Table, Value
from moemm.modalities import KINDS, ModalitySpec, fit_modalities

Draw = Callable[[np.random.Generator], Value]


def modality_cases() -> dict[str, tuple[ModalityInfo, Draw]]:
    """kind -> (what a file would say, a function that draws one value). A series may be ragged or fixed."""
    table: dict[str, Any] = {"num_names": ("a", "b"), "cat_names": ("c",), "cat_sizes": (4,)}
    infos = [
        (ModalityInfo(name="image", kind="image", ragged=False, shape=(3, 14, 10), dtype="uint8"), _pixels),
        (ModalityInfo(name="video", kind="video", ragged=False, shape=(5, 1, 12, 12), rate_hz=25.0), _clip),
        (ModalityInfo(name="wave", kind="audio", ragged=True, shape=(), rate_hz=8000.0), _wave),
        (ModalityInfo(name="mfcc", kind="audio_mfcc", ragged=True, shape=(6,)), _series(6)),
        (ModalityInfo(name="mel", kind="audio_logmel", ragged=True, shape=(8,), rate_hz=62.5), _series(8)),
        (ModalityInfo(name="series", kind="timeseries", ragged=True, shape=(3,), rate_hz=25.0), _series(3)),
        (ModalityInfo(name="imu", kind="sensor", ragged=True, shape=(3,), rate_hz=25.0), _series(3)),
        (ModalityInfo(name="pen", kind="trajectory", ragged=False, shape=(4, 2)), lambda g: _floats(g, 4, 2)),
        (ModalityInfo(name="record", kind="tabular", ragged=False, **table), _table),
        (ModalityInfo(name="text", kind="text", ragged=True), _text),
        (ModalityInfo(name="vector", kind="features", ragged=False, shape=(7,)), lambda g: _floats(g, 7)),
    ]
    return {info.kind: (info, draw) for info, draw in infos}


def fit_case(kind: str, *, config: ModalityConfig | None = None, seed: int = 0) -> tuple[ModalitySpec, list[Value]]:
    """The spec of a case, fitted on 16 values, and those values as the loader's workers would hand them on."""
    info, draw = modality_cases()[kind]
    generator = np.random.default_rng(seed)
    values = [draw(generator) for _ in range(16)]
    chosen = {} if config is None else {info.name: config}
    spec = fit_modalities([info], chosen, lambda _: values)[info.name]
    prepare = KINDS[spec.kind].prepare(spec)
    return spec, values if prepare is None else [prepare(value) for value in values]


def pack_values(info: ModalityInfo, values: Sequence[Value], samples: Sequence[int] | None = None) -> PackedModality:
    """Prepared values as one PackedModality; zero values give zero rows with the right trailing shape and type."""
    sample = torch.as_tensor(list(range(len(values)) if samples is None else samples), dtype=torch.int64)
    if info.kind == "tabular":
        tables = cast(Sequence[Table], values)
        num = np.stack([t.num for t in tables]) if tables else np.zeros((0, len(info.num_names)), np.float32)
        cat = np.stack([t.cat for t in tables]) if tables else np.zeros((0, len(info.cat_names)), np.int32)
        return PackedModality({"num": torch.from_numpy(num), "cat": torch.from_numpy(cat)}, None, sample)
    arrays = cast(Sequence[np.ndarray], values)
    if not info.ragged:
        data = np.stack(arrays) if arrays else np.zeros((0, *info.shape), info.dtype)
        return PackedModality({"data": torch.from_numpy(data)}, None, sample)
    dtype = np.int32 if info.kind == "text" else np.float32
    data = np.concatenate(arrays) if arrays else np.zeros((0, *info.shape), dtype)
    lengths = torch.tensor([len(array) for array in arrays], dtype=torch.int64)
    return PackedModality({"data": torch.from_numpy(data)}, lengths, sample)


def with_nan(packed: PackedModality) -> PackedModality:
    """The same rows with their first number missing, where the modality has floating numbers."""
    fields = {name: field.clone() for name, field in packed.fields.items()}
    for field in fields.values():
        if field.is_floating_point():
            field.reshape(-1)[:1] = float("nan")
    return replace(packed, fields=fields)


def _floats(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.standard_normal(shape).astype(np.float32)


def _series(features: int) -> Draw:
    return lambda generator: _floats(generator, int(generator.integers(1, 40)), features)


def _pixels(generator: np.random.Generator) -> Value:
    return generator.integers(0, 256, (3, 14, 10), dtype=np.uint8)


def _clip(generator: np.random.Generator) -> Value:
    return _floats(generator, 5, 1, 12, 12)


def _wave(generator: np.random.Generator) -> Value:
    return _floats(generator, int(generator.integers(50, 2000)))


def _table(generator: np.random.Generator) -> Value:
    return Table(_floats(generator, 2), generator.integers(0, 4, 1).astype(np.int32))


def _text(generator: np.random.Generator) -> Value:
    words = ["the", "cat", "sat", "on", "a", "mat", "zoë", "naïve"]
    return " ".join(generator.choice(words, int(generator.integers(1, 12))))
