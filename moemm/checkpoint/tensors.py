"""Tensors as safetensors files that others may read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of the CPU to `path`; who may read its folder may read the file.

    Raises OSError, SafetensorError.
    """
    save_file(dict(tensors), path, dict(metadata) if metadata else None)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors leaves it to its owner alone
