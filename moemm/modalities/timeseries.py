"""Time series: patches of all channels together. Ragged rows, NaN where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Value
from moemm.modalities.base import ModalitySpec, Tokenizer, Tokens, sequence_positions, unknown_time
from moemm.modalities.registry import register_modality
from moemm.modalities.signal import Frames, Patches, fit_statistics, frames_of, normalize_rows, patches_of, with_mask
from moemm.modalities.targets import Targets, TargetShape, value_targets


class SignalTokenizer(Tokenizer):
    """What time series, sensors and audio frames have in common: normalisation, noise, patches, time in seconds."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "patch": [8],
        "normalize": "train",
        "dropout": 0.0,
        "noise": 0.0,
    }
    mean_F: torch.Tensor
    deviation_F: torch.Tensor

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(spec, dim)
        self.patch = int(spec.options["patch"][0])
        self.num_features = num_features(spec)
        ones = [1.0] * self.num_features
        mean = torch.tensor(spec.fitted.get("mean", [0.0] * self.num_features))
        self.register_buffer("mean_F", mean, persistent=False)
        self.register_buffer("deviation_F", torch.tensor(spec.fitted.get("deviation", ones)), persistent=False)

    @classmethod
    def fit(cls, info: ModalityInfo, options: Mapping[str, Any], values: Iterable[Value]) -> dict[str, Any]:
        """Mean and deviation of each channel over the train split, where the options ask for them."""
        del info
        return fit_statistics(values) if options["normalize"] == "train" else {}

    def frames(self, packed: PackedModality) -> Frames:
        """The rows as frames; audio with another front end overrides this."""
        return frames_of(packed)

    def normalized(self, packed: PackedModality, *, kind: str) -> Frames:
        """The frames with values normalised as `kind` (the option `normalize`) says."""
        frames = self.frames(packed)
        if kind == "sample":
            return frames._replace(values_RF=normalize_rows(frames))
        if kind == "train":
            return frames._replace(values_RF=(frames.values_RF - self.mean_F) / self.deviation_F)
        return frames

    def patches(self, packed: PackedModality) -> Patches:
        """Normalised patches, with noise while training."""
        frames = self.normalized(packed, kind=self.spec.options["normalize"])
        noise = self.spec.options["noise"]
        if self.training and noise:
            frames = frames._replace(values_RF=frames.values_RF + noise * torch.randn_like(frames.values_RF))
        return patches_of(frames, self.patch)

    def clean_patches(self, packed: PackedModality) -> torch.Tensor:
        """(T, p, F) for masked modelling, without noise, in units of about 1.

        Not standardised patch by patch, as pictures are: the level of a band or an axis is what tells signals apart.
        """
        kind = self.spec.options["normalize"]
        return patches_of(self.normalized(packed, kind="sample" if kind == "none" else kind), self.patch).values_TpF

    def times(self, index_T: torch.Tensor) -> torch.Tensor:
        """(T,) seconds of the middle of each patch, NaN where the rate is not known."""
        rate = self.spec.info.rate_hz
        return (index_T + 0.5) * (self.patch / rate) if rate else unknown_time(index_T)


@register_modality("timeseries")
class TimeSeries(SignalTokenizer):
    """A token a patch of `patch` frames, over all channels: (frames x channels) + what is missing -> D."""

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(spec, dim)
        self.project = nn.Linear(2 * self.patch * self.num_features, dim)

    def forward(self, packed: PackedModality) -> Tokens:
        """(n, L, F) or ragged (R, F) -> ceil(length / patch) tokens a row."""
        patches = self.patches(packed)
        values_TD = self.project(with_mask(patches.values_TpF).to(self.project.weight.dtype))
        position_TP = sequence_positions(patches.index_T)
        return self.drop(Tokens(values_TD, patches.row_T, position_TP, self.times(patches.index_T)))

    @property
    def target_shape(self) -> TargetShape:
        """The values of a patch."""
        return TargetShape(values=self.patch * self.num_features)

    def targets(self, packed: PackedModality) -> Targets:
        """The normalised values of each patch."""
        return value_targets(self.clean_patches(packed).flatten(1))


def num_features(spec: ModalitySpec) -> int:
    """Features of one frame: the last axis, or the product of all axes after time."""
    shape = spec.info.shape
    axes = shape if spec.info.ragged or len(shape) == 1 else shape[1:]
    return int(torch.Size(axes).numel())
