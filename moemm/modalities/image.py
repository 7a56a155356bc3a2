"""Images: non-overlapping patches. n rows, C channels, H and W pixels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import nn

from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Value
from moemm.errors import ConfigError
from moemm.modalities.base import ModalitySpec, Tokenizer, Tokens, grid_positions, unknown_time
from moemm.modalities.registry import register_modality
from moemm.modalities.targets import Targets, TargetShape, standardize_tokens, value_targets


class GridTokenizer(Tokenizer):
    """Images and video clips, (C, H, W) or (frames, C, H, W): a token a block of `patch` pixels."""

    position_TP: torch.Tensor
    mean_C: torch.Tensor
    deviation_C: torch.Tensor

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(spec, dim)
        self.size, self.patch = grid_of(spec)
        self.counts = tuple(-(-size // patch) for size, patch in zip(self.size, self.patch, strict=True))
        self.channels = spec.info.shape[-3]
        self.scale = 1.0 / 255.0 if spec.info.dtype == "uint8" else 1.0
        self.project = nn.Linear(int(np.prod(self.patch)) * self.channels, dim)
        self.register_buffer("position_TP", grid_positions(*self.counts), persistent=False)
        self.register_buffer("mean_C", _channels(spec, "mean", 0.0), persistent=False)
        self.register_buffer("deviation_C", _channels(spec, "deviation", 1.0), persistent=False)

    @classmethod
    def fit(cls, info: ModalityInfo, options: Mapping[str, Any], values: Iterable[Value]) -> dict[str, Any]:
        """Mean and deviation of each channel over the train split, in the file's own units."""
        if options["normalize"] != "train":
            return {}
        count, total, square = 0, 0.0, 0.0
        for value in values:
            stored = np.asarray(value)
            pixels = np.moveaxis(stored.astype(np.float64), -3, 0).reshape(info.shape[-3], -1)
            add = np.nansum if stored.dtype.kind == "f" else np.sum  # of whole numbers none is missing
            count, total, square = count + pixels.shape[1], total + add(pixels, 1), square + add(pixels**2, 1)
        mean = total / max(count, 1)
        deviation = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 1e-12))
        return {"mean": np.atleast_1d(mean).tolist(), "deviation": np.atleast_1d(deviation).tolist()}

    def blocks(self, data: torch.Tensor) -> torch.Tensor:
        """(n, frames, C, H, W) -> (n, tokens, values of a block); what a block lacks at the edge is 0."""
        data = (data.float() - self.mean_C) / self.deviation_C
        data = data.masked_fill(data.isnan(), 0.0)  # an infinite value stays one, and is noticed
        lack = [c * p - s for s, p, c in zip(self.size, self.patch, self.counts, strict=True)]
        if any(lack):
            data = nn.functional.pad(data, (0, lack[2], 0, lack[1], 0, 0, 0, lack[0]))
        pt, ph, pw = self.patch
        return rearrange(data, "n (t pt) c (h ph) (w pw) -> n (t h w) (pt c ph pw)", pt=pt, ph=ph, pw=pw)

    def forward(self, packed: PackedModality) -> Tokens:
        """(n, C, H, W) or (n, frames, C, H, W) -> as many tokens a row as blocks."""
        blocks = self.blocks(clips(packed)).to(self.project.weight.dtype)
        n, num = blocks.shape[:2]
        row_T = torch.arange(n, device=blocks.device).repeat_interleave(num)
        position_TP = self.position_TP.repeat(n, 1)
        values_TD = self.project(blocks.flatten(0, 1))
        return self.drop(Tokens(values_TD, row_T, position_TP, self.times(position_TP[:, 0])))

    @property
    def target_shape(self) -> TargetShape:
        """The pixels of a block."""
        return TargetShape(values=self.project.in_features)

    def targets(self, packed: PackedModality) -> Targets:
        """The pixels of each block, less their mean, over their deviation."""
        return value_targets(standardize_tokens(self.blocks(clips(packed)).flatten(0, 1)))

    def times(self, frame_T: torch.Tensor) -> torch.Tensor:
        """(T,) seconds of the middle of each block, NaN where the rate is not known."""
        rate = self.spec.info.rate_hz
        return (frame_T + 0.5) * (self.patch[0] / rate) if rate else unknown_time(frame_T)


@register_modality("image")
class Image(GridTokenizer):
    """Patches of `patch` = [height, width] pixels (ViT, arXiv:2010.11929)."""

    defaults: ClassVar[Mapping[str, Any]] = {"patch": [8, 8], "normalize": "train", "dropout": 0.0}


def clips(packed: PackedModality) -> torch.Tensor:
    """(n, frames, C, H, W) of images and clips alike."""
    data = packed.fields["data"]
    return data[:, None] if data.dim() == 4 else data


def grid_of(spec: ModalitySpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(frames, H, W) of the modality and of its patch. ConfigError where their numbers of axes differ."""
    shape, patch = spec.info.shape, list(spec.options["patch"])
    size = (shape[0] if len(shape) == 4 else 1, *shape[-2:])
    wanted = len(shape) - 1
    if len(patch) != wanted:
        names = "[frames, height, width]" if wanted == 3 else "[height, width]"
        raise ConfigError(f"modalities.{spec.info.name}.patch is {patch}; a {spec.kind} needs {wanted}: {names}")
    return size, tuple(patch if wanted == 3 else [1, *patch])


def _channels(spec: ModalitySpec, name: str, default: float) -> torch.Tensor:
    """(C, 1, 1) statistics of the channels."""
    values = spec.fitted.get(name, [default] * spec.info.shape[-3])
    return torch.tensor(values, dtype=torch.float32)[:, None, None]
