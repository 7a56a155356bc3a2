"""What one modality of one sample, and one target, can be. Imports no torch, so that files can be inspected at once."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Table(NamedTuple):
    """One tabular record: `num` (Dn,) float32 with NaN = missing, `cat` (Dc,) int32 with 0 = missing.

    The writer takes whole columns in the same form: `num` (N, Dn), `cat` (N, Dc).
    """

    num: np.ndarray
    cat: np.ndarray


Value = np.ndarray | str | Table
"""One modality of one sample: fixed or ragged array, text, or table."""

Target = int | float | np.ndarray
"""One target: class id, number, or (C,) float32 array (multilabel, vector regression)."""
