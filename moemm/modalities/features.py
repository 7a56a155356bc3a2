"""Plain features, the fall-back: any (T, F) or (F,) array, a token a row of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moemm.modalities.registry import register_modality
from moemm.modalities.timeseries import TimeSeries


@register_modality("features")
class Features(TimeSeries):
    """Each (F,) vector is a token; further axes are flattened into F."""

    defaults: ClassVar[Mapping[str, Any]] = {**TimeSeries.defaults, "patch": [1]}
