"""Modules whose constants keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class ExactBuffers(nn.Module):
    """A module whose buffers (statistics, frequencies, filters, biases) move between devices but keep their precision.

    `module.bfloat16()`, which DeepSpeed calls too, would round them: a quantile edge or an angle would be off by 1 %.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self
