"""Audio: frames of MFCC or log-mel as they stand in the file, and waveforms through our log-mel front end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Value
from moemm.errors import DataError
from moemm.modalities.base import ModalitySpec
from moemm.modalities.logmel import LogMel
from moemm.modalities.registry import register_modality
from moemm.modalities.signal import Frames, fit_statistics, ranges
from moemm.modalities.timeseries import TimeSeries


@register_modality("audio_mfcc", "audio_logmel")
class AudioFrames(TimeSeries):
    """A token for `patch` frames of MFCC or log-mel; `rate_hz` of the file is the frame rate."""

    defaults: ClassVar[Mapping[str, Any]] = {**TimeSeries.defaults, "patch": [2]}


@register_modality("audio")
class Waveform(TimeSeries):
    """Samples of a waveform, (L,) or (L, 1) at `rate_hz` -> log-mel frames -> a token for `patch` frames."""

    defaults: ClassVar[Mapping[str, Any]] = {
        **TimeSeries.defaults,
        "patch": [4],
        "num_mels": 40,
        "window_ms": 25.0,
        "hop_ms": 10.0,
    }

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(_as_frames(spec), dim)
        self.logmel = front_end(spec.info, spec.options)

    @classmethod
    def fit(cls, info: ModalityInfo, options: Mapping[str, Any], values: Iterable[Value]) -> dict[str, Any]:
        """Statistics of the log-mel bands over the train split."""
        mel = front_end(info, options)
        wave = (torch.as_tensor(value).float().flatten() for value in values)
        frames = (mel(w, torch.tensor([w.numel()]))[0].numpy() for w in wave)
        return fit_statistics(frames) if options["normalize"] == "train" else {}

    def frames(self, packed: PackedModality) -> Frames:
        """Log-mel frames of every row's waveform."""
        data = packed.fields["data"].float()
        lengths_n = packed.lengths
        if lengths_n is None:
            lengths_n = torch.full((data.shape[0],), data[:1].numel(), dtype=torch.int64, device=data.device)
        values_RF, num_n = self.logmel(data.flatten(), lengths_n)
        return Frames(values_RF, *ranges(num_n), num_n)


def front_end(info: ModalityInfo, options: Mapping[str, Any]) -> LogMel:
    """The log-mel transform for a waveform's rate. DataError where the file does not name the rate or has channels."""
    if not info.rate_hz:
        raise DataError(
            f"modality '{info.name}' is a waveform without a rate: set the attribute rate_hz (samples a second) on "
            f"/modalities/{info.name}, or store frames as audio_mfcc or audio_logmel"
        )
    if info.ragged and info.shape not in ((), (1,)):
        raise DataError(f"modality '{info.name}': a waveform has one channel, this one has shape {info.shape}")
    return LogMel(info.rate_hz, num_mels=options["num_mels"], window_ms=options["window_ms"], hop_ms=options["hop_ms"])


def _as_frames(spec: ModalitySpec) -> ModalitySpec:
    """The same modality seen after the front end: ragged frames of mel bands at the frame rate."""
    from dataclasses import replace

    info = replace(spec.info, ragged=True, shape=(spec.options["num_mels"],), rate_hz=1000.0 / spec.options["hop_ms"])
    return replace(spec, info=info)
