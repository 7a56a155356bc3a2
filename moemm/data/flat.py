"""A batch in one buffer, to send from a worker in one piece instead of a shared-memory file for every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moemm.data.limits import MIB
from moemm.data.quarantine import Bad
from moemm.data.sample import PackedBatch

_ALIGNMENT = 64
_THROUGH_PIPE = 8 * MIB
"""Up to this size a buffer goes through the worker's pipe, above it through shared memory, which is often small."""


@dataclass(slots=True)
class FlatBatch:
    """A PackedBatch whose tensors are places (start, type, shape) in `buffer`, an array (sent by pipe) or a tensor."""

    batch: PackedBatch
    buffer: np.ndarray | torch.Tensor
    bad: tuple[Bad, ...] = ()
    """Samples that were put aside while it was made."""

    def pin_memory(self) -> FlatBatch:
        """The same batch with its buffer in pinned memory (called by the DataLoader)."""
        return FlatBatch(self.batch, torch.as_tensor(self.buffer).pin_memory(), self.bad)


def flatten(batch: PackedBatch, bad: Sequence[Bad] = ()) -> FlatBatch:
    """`batch` with all its tensors copied into one buffer."""
    pieces: list[tuple[int, np.ndarray]] = []
    end = 0

    def place(tensor: torch.Tensor) -> Any:
        nonlocal end
        data = tensor.contiguous().numpy().reshape(-1).view(np.uint8)
        start, end = end, end + -(-data.size // _ALIGNMENT) * _ALIGNMENT
        pieces.append((start, data))
        return start, tensor.dtype, tuple(tensor.shape)

    places = batch.map(place)
    buffer = np.zeros(end, np.uint8)
    for start, data in pieces:
        buffer[start : start + data.size] = data
    return FlatBatch(places, buffer if end <= _THROUGH_PIPE else torch.from_numpy(buffer), tuple(bad))


def unflatten(flat: FlatBatch) -> PackedBatch:
    """The batch again; its tensors are views into the buffer."""
    buffer = torch.as_tensor(flat.buffer)

    def view(place: Any) -> torch.Tensor:
        start, dtype, shape = place
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        return buffer[start : start + num_bytes].view(dtype).view(shape)

    return flat.batch.map(view)
