"""Where a token is: n-D Fourier features of its position and of continuous time, shared by all modalities.

T tokens, D width, P = 3 axes (place in the sequence; y and x in [-1, 1]).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from moemm.exact import ExactBuffers

SEQUENCE_BANDS, SPACE_BANDS, TIME_BANDS = 8, 4, 8


class FourierPosition(ExactBuffers):
    """Sines and cosines of the position, then one linear map to D.

    Sequence axis: wavelengths 2 to 512 tokens. Spatial axes: 1 to 2^3 half waves over the picture. Time: wavelengths
    0.05 to 100 seconds, and a flag that says whether the time is known (NaN: it is not), so that signals of different
    rates meet on one clock.
    """

    sequence_B: torch.Tensor
    space_B: torch.Tensor
    time_B: torch.Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("sequence_B", _frequencies(2.0, 512.0, SEQUENCE_BANDS), persistent=False)
        self.register_buffer("space_B", math.pi * 2.0 ** torch.arange(SPACE_BANDS), persistent=False)
        self.register_buffer("time_B", _frequencies(0.05, 100.0, TIME_BANDS), persistent=False)
        self.project = nn.Linear(2 * (SEQUENCE_BANDS + 2 * SPACE_BANDS + TIME_BANDS) + 1, dim)

    def forward(self, position_TP: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        """position_TP (T, 3), time_T (T,) seconds or NaN -> (T, D)."""
        known_T = torch.isfinite(time_T)
        clock_TB = torch.where(known_T, time_T, 0.0)[:, None] * self.time_B
        angles = torch.cat(
            [
                position_TP[:, :1] * self.sequence_B,
                position_TP[:, 1:2] * self.space_B,
                position_TP[:, 2:3] * self.space_B,
            ],
            dim=1,
        )
        time = torch.cat([clock_TB.sin(), clock_TB.cos()], dim=1) * known_T[:, None]
        waves = torch.cat([angles.sin(), angles.cos(), time, known_T[:, None].float()], dim=1)
        return self.project(waves.to(self.project.weight.dtype))


def _frequencies(shortest: float, longest: float, count: int) -> torch.Tensor:
    """(count,) angular frequencies for wavelengths spaced evenly on a log scale."""
    waves = torch.exp(torch.linspace(math.log(shortest), math.log(longest), count))
    return 2 * math.pi / waves
