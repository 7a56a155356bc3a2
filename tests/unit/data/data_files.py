"""Modalities of every form, for the files of these tests."""

from __future__ import annotations

import numpy as np

from moemm.data import ModalityData, Table

NUM_SAMPLES = 24


def every_form(num_samples: int = NUM_SAMPLES, *, seed: int = 0) -> dict[str, ModalityData]:
    """Fixed, ragged, text, table and image. Sample 1 lacks the table, 2 the series, 3 the text, 4 the image."""
    random = np.random.default_rng(seed)
    num = random.normal(size=(num_samples, 2)).astype(np.float32)
    cat = random.integers(1, 4, (num_samples, 1)).astype(np.int32)
    num[1], cat[1] = np.nan, 0
    series = [random.normal(size=(1 + i % 5, 3)).astype(np.float32) for i in range(num_samples)]
    images = [random.integers(0, 256, (1, 4, 4)).astype(np.uint8) for _ in range(num_samples)]
    return {
        "accel": ModalityData(kind="timeseries", values=random.normal(size=(num_samples, 6, 2)), rate_hz=25.0),
        "image": ModalityData(kind="image", values=[None if i == 4 else image for i, image in enumerate(images)]),
        "record": ModalityData(kind="tabular", values=Table(num, cat), num_names=["a", "b"], cat_sizes=[4]),
        "series": ModalityData(kind="audio_mfcc", values=[None if i == 2 else s for i, s in enumerate(series)]),
        "text": ModalityData(kind="text", values=["" if i == 3 else f"sämple {i}" for i in range(num_samples)]),
    }
