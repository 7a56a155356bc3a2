"""Waveform -> log-mel frames, over ragged rows without padding. S samples, W window, R frames, F mel bands."""

from __future__ import annotations

import math

import torch

from moemm.exact import ExactBuffers
from moemm.modalities.signal import ranges


class LogMel(ExactBuffers):
    """Hann window, power spectrum, triangular mel filters (HTK scale), natural logarithm.

    rate_hz: samples a second. A row shorter than the window gives one frame, zeros behind its end.
    """

    hann_W: torch.Tensor
    mel_BF: torch.Tensor

    def __init__(self, rate_hz: float, *, num_mels: int, window_ms: float, hop_ms: float):
        super().__init__()
        self.window = max(int(rate_hz * window_ms / 1000), 1)
        self.hop = max(int(rate_hz * hop_ms / 1000), 1)
        size = 2 ** math.ceil(math.log2(max(self.window, 2 * num_mels)))
        self.size = size
        self.register_buffer("hann_W", torch.hann_window(self.window, periodic=True), persistent=False)
        self.register_buffer("mel_BF", mel_filters(size, num_mels, rate_hz), persistent=False)

    def forward(self, wave_S: torch.Tensor, lengths_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Waves of all rows joined (S,), their lengths (n,) -> frames (R, F) and frames a row (n,)."""
        num_n = torch.where(lengths_n > 0, (lengths_n - self.window).clamp_min(0) // self.hop + 1, 0)
        row_R, step_R = ranges(num_n)
        start_n = lengths_n.cumsum(0) - lengths_n
        offset_RW = step_R[:, None] * self.hop + torch.arange(self.window, device=wave_S.device)
        inside_RW = offset_RW < lengths_n[row_R][:, None]
        index_RW = (start_n[row_R][:, None] + offset_RW).clamp_max(max(wave_S.numel() - 1, 0))
        frames_RW = torch.where(inside_RW, wave_S[index_RW], 0.0) * self.hann_W
        if not frames_RW.shape[0]:
            return wave_S.new_zeros(0, self.mel_BF.shape[1]), num_n
        power_RB = torch.fft.rfft(frames_RW, n=self.size).abs().square()
        return torch.log(power_RB @ self.mel_BF + 1e-6), num_n


def mel_filters(size: int, num_mels: int, rate_hz: float) -> torch.Tensor:
    """(size / 2 + 1, num_mels) triangles, equally spaced on the HTK mel scale from 0 to rate / 2."""
    top = 2595.0 * math.log10(1.0 + rate_hz / 2 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, num_mels + 2) / 2595.0) - 1.0)
    bins_B = torch.linspace(0.0, rate_hz / 2, size // 2 + 1)
    rise_BF = (bins_B[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall_BF = (edges[2:] - bins_B[:, None]) / (edges[2:] - edges[1:-1])
    return torch.minimum(rise_BF, fall_BF).clamp_min(0.0)
