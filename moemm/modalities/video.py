"""Video clips: tubelets, blocks of frames x height x width (ViViT, arXiv:2103.15691)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moemm.modalities.image import GridTokenizer
from moemm.modalities.registry import register_modality


@register_modality("video")
class Video(GridTokenizer):
    """Clips (frames, C, H, W); `patch` = [frames, height, width]. Time is known where the file names `rate_hz`."""

    defaults: ClassVar[Mapping[str, Any]] = {"patch": [2, 8, 8], "normalize": "train", "dropout": 0.0}
