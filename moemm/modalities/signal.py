"""Shared by all sampled signals: statistics of the train split, normalisation, and patches of ragged rows.

n rows, R frames of all rows joined, F features, T patches, p frames a patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

from moemm.data.sample import PackedModality, Value


class Frames(NamedTuple):
    """values_RF with NaN where nothing was measured; row_R and step_R (its number in the row) int64; lengths_n."""

    values_RF: torch.Tensor
    row_R: torch.Tensor
    step_R: torch.Tensor
    lengths_n: torch.Tensor


class Patches(NamedTuple):
    """values_TpF with NaN in the tail of each row's last patch; row_T and index_T (its number in the row) int64."""

    values_TpF: torch.Tensor
    row_T: torch.Tensor
    index_T: torch.Tensor


def fit_statistics(values: Iterable[Value]) -> dict[str, Any]:
    """Mean and deviation of each feature (last axis) over the finite values of the train split."""
    count, total, square = np.zeros(1), np.zeros(1), np.zeros(1)
    for value in values:
        rows = np.asarray(value, dtype=np.float64)
        rows = rows.reshape(-1, rows.shape[-1])
        seen = np.isfinite(rows)
        whole = bool(seen.all())
        rows = rows if whole else np.where(seen, rows, 0.0)
        count = count + (len(rows) if whole else seen.sum(0))
        total, square = total + rows.sum(0), square + (rows**2).sum(0)
    mean = total / np.maximum(count, 1)
    deviation = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 0.0))
    return {"mean": mean.tolist(), "deviation": np.where(deviation > 1e-6, deviation, 1.0).tolist()}


def ranges(lengths_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows of given lengths, joined: the row of each element, and its number within the row."""
    rows = torch.arange(lengths_n.shape[0], device=lengths_n.device)
    row_R = torch.repeat_interleave(rows, lengths_n)
    starts_n = lengths_n.cumsum(0) - lengths_n
    step_R = torch.arange(row_R.shape[0], device=lengths_n.device) - starts_n[row_R]
    return row_R, step_R


def frames_of(packed: PackedModality) -> Frames:
    """The frames of a fixed (n, L, F) or ragged (R, F) series; a fixed (n, F) one is a single frame a row."""
    data = packed.fields["data"]
    if packed.lengths is not None:
        row_R, step_R = ranges(packed.lengths)
        return Frames(data.float(), row_R, step_R, packed.lengths)
    if data.dim() == 2:
        data = data[:, None]
    lengths_n = torch.full((data.shape[0],), data.shape[1], dtype=torch.int64, device=data.device)
    row_R, step_R = ranges(lengths_n)
    return Frames(data.flatten(0, 1).flatten(1).float(), row_R, step_R, lengths_n)


def normalize_rows(frames: Frames) -> torch.Tensor:
    """(R, F): each row less its own mean, over its own deviation, per feature; NaN stays NaN."""
    seen_RF = torch.isfinite(frames.values_RF)
    filled_RF = torch.where(seen_RF, frames.values_RF, 0.0)
    shape = (frames.lengths_n.shape[0], filled_RF.shape[1])
    count_nF = filled_RF.new_zeros(shape).index_add(0, frames.row_R, seen_RF.float()).clamp_min(1.0)
    mean_nF = filled_RF.new_zeros(shape).index_add(0, frames.row_R, filled_RF) / count_nF
    centred_RF = torch.where(seen_RF, frames.values_RF - mean_nF[frames.row_R], 0.0)
    variance_nF = centred_RF.new_zeros(shape).index_add(0, frames.row_R, centred_RF.square()) / count_nF
    scaled_RF = centred_RF * torch.rsqrt(variance_nF + 1e-5)[frames.row_R]
    return torch.where(seen_RF, scaled_RF, float("nan"))


def patches_of(frames: Frames, patch: int) -> Patches:
    """Cut every row into patches of `patch` frames; the last one of a row may be part empty (NaN)."""
    num_n = (frames.lengths_n + patch - 1) // patch
    row_T, index_T = ranges(num_n)
    first_n = num_n.cumsum(0) - num_n
    values = frames.values_RF.new_full((row_T.shape[0] * patch, frames.values_RF.shape[1]), float("nan"))
    target_R = first_n[frames.row_R] * patch + frames.step_R
    values = values.index_copy(0, target_R, frames.values_RF)
    return Patches(values.reshape(-1, patch, frames.values_RF.shape[1]), row_T, index_T)


def with_mask(values: torch.Tensor) -> torch.Tensor:
    """(T, ...) with NaN -> (T, 2 x product): values with 0 for NaN, and 1 where it was NaN."""
    missing = torch.isnan(values)
    return torch.cat([torch.where(missing, 0.0, values).flatten(1), missing.to(values.dtype).flatten(1)], dim=1)
