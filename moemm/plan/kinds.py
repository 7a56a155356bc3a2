"""What each kind of modality weighs and how many tokens it makes, by formula; moemm/modalities has the tokenizers.

D width of the stream. tests/unit/plan holds the options and the formulas to the tokenizers themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_BYTES, NUM_BINS = 256, 16
_SERIES: dict[str, Any] = {"patch": [8], "normalize": "train", "dropout": 0.0, "noise": 0.0}

OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"patch": [8, 8], "normalize": "train", "dropout": 0.0},
    "video": {"patch": [2, 8, 8], "normalize": "train", "dropout": 0.0},
    "timeseries": _SERIES,
    "features": {**_SERIES, "patch": [1]},
    "sensor": _SERIES,
    "trajectory": _SERIES,
    "audio_mfcc": {**_SERIES, "patch": [2]},
    "audio_logmel": {**_SERIES, "patch": [2]},
    "audio": {**_SERIES, "patch": [4], "num_mels": 40, "window_ms": 25.0, "hop_ms": 10.0},
    "tabular": {"dropout": 0.0},
    "text": {"vocabulary": "word", "vocab_size": 8192, "max_tokens": 256, "dropout": 0.0},
}
"""Kind -> its options and their defaults."""
FALLBACK = "features"
"""Kind that serves those which nothing here knows, as in training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """A modality as a file, a run or a description has it.

    shape: of one sample without the ragged axis. vocabulary: entries of a text's vocabulary, bytes included.
    numeric, categories: number of numeric columns of a table, and sizes of its categorical ones.
    weights, tokens: of a kind that a plugin brings, which has no formula here.
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    ragged: bool = False
    rate_hz: float | None = None
    numeric: int = 0
    categories: tuple[int, ...] = ()
    vocabulary: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: int | None = None

    @property
    def patch(self) -> int:
        """Frames of a token, of a series."""
        return int(self.options["patch"][0])

    @property
    def features(self) -> int:
        """Numbers of one frame, of a series; mel bands of a waveform."""
        if self.kind == "audio":
            return int(self.options["num_mels"])
        axes = self.shape if self.ragged or len(self.shape) == 1 else self.shape[1:]
        return math.prod(axes)

    @property
    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and patch (frames, height, width) of an image or clip."""
        size = (self.shape[0] if len(self.shape) == 4 else 1, *self.shape[-2:])
        patch = tuple(self.options["patch"])
        return size, patch if len(patch) == 3 else (1, *patch)


@dataclass(frozen=True, slots=True)
class Target:
    """What a token can tell in masked modelling: widths of its decoder, groups of tokens. As modalities.TargetShape."""

    values: int = 0
    classes: int = 0
    groups: int = 1


def is_grid(signal: Signal) -> bool:
    """Whether the modality is cut into blocks of pixels."""
    return signal.kind in ("image", "video")


def weights(signal: Signal, dim: int) -> dict[str, int]:
    """Name -> size of each parameter of the tokenizer, as torch names them."""
    if signal.weights is not None:
        return {"weights": signal.weights}
    if signal.kind == "text":
        return {"embedding_VD": (signal.vocabulary or NUM_BYTES) * dim}
    if signal.kind == "tabular":
        return _table_weights(signal, dim)
    sizes = {"project.weight": inputs(signal) * dim, "project.bias": dim}
    if signal.kind in ("sensor", "trajectory"):
        sizes["channel_FD"] = signal.features * dim
    return sizes


def _table_weights(signal: Signal, dim: int) -> dict[str, int]:
    numeric, categories = signal.numeric, signal.categories
    sizes = {
        "bins_NBD": numeric * NUM_BINS * dim,
        "missing_ND": numeric * dim,
        "category_SD": sum(categories) * dim,
        "column_CD": (numeric + len(categories)) * dim,
    }
    return {name: size for name, size in sizes.items() if size or name == "column_CD"}


def inputs(signal: Signal) -> int:
    """Numbers that the projection of one token reads; 0 for kinds without one."""
    if is_grid(signal):
        return math.prod(signal.grid[1]) * signal.shape[-3]
    if signal.kind in ("sensor", "trajectory"):
        return 2 * signal.patch
    if signal.kind in ("text", "tabular") or signal.weights is not None:
        return 0
    return 2 * signal.patch * signal.features


def numbers(signal: Signal, length: float) -> float:
    """Numbers that one sample brings to the device; length: of its ragged axis."""
    if signal.kind == "text":
        return length
    if signal.kind == "tabular":
        return signal.numeric + len(signal.categories)
    return math.prod(signal.shape) * (length if signal.ragged else 1.0)


def tokens(signal: Signal, length: int = 0) -> int:
    """Tokens of one sample; length: of its ragged axis (of a text: ids)."""
    if is_grid(signal):
        return math.prod(-(-size // patch) for size, patch in zip(*signal.grid, strict=True))
    if signal.kind == "tabular":
        return signal.numeric + len(signal.categories)
    if signal.kind == "text":
        return min(length, int(signal.options["max_tokens"]))
    frames = length if signal.ragged else _fixed_frames(signal)
    if signal.kind == "audio":
        frames = _mel_frames(signal, frames)
    patches = -(-frames // signal.patch)
    return patches * (signal.features if signal.kind in ("sensor", "trajectory") else 1)


def _fixed_frames(signal: Signal) -> int:
    if signal.kind == "audio":
        return math.prod(signal.shape)
    return 1 if len(signal.shape) == 1 else signal.shape[0]


def _mel_frames(signal: Signal, samples: int) -> int:
    """Frames of the log-mel front end, see modalities/logmel.py."""
    rate = signal.rate_hz or 0.0
    window = max(int(rate * signal.options["window_ms"] / 1000), 1)
    hop = max(int(rate * signal.options["hop_ms"] / 1000), 1)
    return max(samples - window, 0) // hop + 1 if samples else 0


def target(signal: Signal) -> Target | None:
    """What the modality's tokens can tell; None where nothing is known of the kind."""
    if signal.weights is not None:
        return None
    if signal.kind == "text":
        return Target(classes=signal.vocabulary or NUM_BYTES)
    if signal.kind == "tabular":
        return Target(signal.numeric, sum(signal.categories), signal.numeric + len(signal.categories))
    if is_grid(signal):
        return Target(values=inputs(signal))
    if signal.kind in ("sensor", "trajectory"):
        return Target(values=signal.patch, groups=signal.features)
    return Target(values=signal.patch * signal.features)


def resolve(kind: str, given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind that serves, and its options: defaults with what the configuration gives over them."""
    served = kind if kind in OPTIONS else FALLBACK
    known = OPTIONS[served]
    return served, {**known, **{key: value for key, value in given.items() if value is not None and key in known}}


def mean_and_deviation(counts: Sequence[int]) -> tuple[float, float]:
    """Of token counts; 0 of none."""
    if not counts:
        return 0.0, 0.0
    mean = sum(counts) / len(counts)
    return mean, math.sqrt(sum((count - mean) ** 2 for count in counts) / len(counts))
