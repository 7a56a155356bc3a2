"""Sensors and trajectories: like time series, but each channel has its own tokens and an identity.

So channels can be compared and attended to one by one, which pays where they measure different things.
"""

from __future__ import annotations

import torch
from torch import nn

from moemm.data.sample import PackedModality
from moemm.modalities.base import ModalitySpec, Tokens, sequence_positions
from moemm.modalities.registry import register_modality
from moemm.modalities.signal import with_mask
from moemm.modalities.targets import Targets, TargetShape, value_targets
from moemm.modalities.timeseries import SignalTokenizer


@register_modality("sensor", "trajectory")
class Sensor(SignalTokenizer):
    """A token a channel and patch: one projection for all channels + the channel's learned vector."""

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(spec, dim)
        self.project = nn.Linear(2 * self.patch, dim)
        self.channel_FD = nn.Parameter(torch.randn(self.num_features, dim) * 0.5)

    def forward(self, packed: PackedModality) -> Tokens:
        """(n, L, F) or ragged (R, F) -> F x ceil(length / patch) tokens a row."""
        patches = self.patches(packed)
        num = self.num_features
        values = patches.values_TpF.transpose(1, 2).flatten(0, 1)
        values_TD = self.project(with_mask(values).to(self.project.weight.dtype))
        values_TD = values_TD + self.channel_FD.repeat(patches.row_T.shape[0], 1)
        index_T, row_T = patches.index_T.repeat_interleave(num), patches.row_T.repeat_interleave(num)
        return self.drop(Tokens(values_TD, row_T, sequence_positions(index_T), self.times(index_T)))

    @property
    def target_shape(self) -> TargetShape:
        """The values of one channel's patch; each channel is a group."""
        return TargetShape(values=self.patch, groups=self.num_features)

    def targets(self, packed: PackedModality) -> Targets:
        """The normalised values of each channel's patch."""
        values_TFp = self.clean_patches(packed).transpose(1, 2)
        channel_T = torch.arange(self.num_features, device=values_TFp.device).repeat(values_TFp.shape[0])
        return value_targets(values_TFp.flatten(0, 1), channel_T)
