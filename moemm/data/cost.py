"""What a sample of a large file costs to read: of arrays that are not kept decoded, every chunk that it touches."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moemm.data.layout import Layout
from moemm.data.limits import CACHE_BYTES, KIB, size
from moemm.data.storage import Storage

_MOST = 16
"""Times its own bytes, and times those of the writer's chunks: beyond that, reading is what training waits for."""
_FEW_BYTES = 64 * KIB


def costly_arrays(layout: Layout) -> list[str]:
    """A remark for each array of which a sample takes much more to decode than it has.

    A file that can be kept whole is decoded once, whatever its chunks are.
    """
    if sum(storage.num_bytes for storage in layout.storages()) <= CACHE_BYTES:
        return []
    parts = [part for modality in layout.modalities.values() for part in modality.parts.values()]
    return [text for part in parts for text in _remark(part, layout.num_samples)]


def _remark(storage: Storage, num_samples: int) -> Iterator[str]:
    if storage.pieces or storage.inline is not None or not storage.num_bytes:
        return
    rows = storage.shape[0] / num_samples
    # Rows from anywhere: one chunk, and as many more as they reach into.
    chunks = (1 + max(rows - 1, 0) / storage.chunk[0]) * math.prod(storage.grid[1:])
    own, decoded = rows * storage.row_bytes, chunks * storage.chunk_bytes
    if decoded > _MOST * max(own, _FEW_BYTES):
        whole = (max(1, min(storage.shape[0], _FEW_BYTES // storage.row_bytes)), *storage.shape[1:])
        yield (
            f"{storage.name}: a sample of {size(int(own))} costs {size(int(decoded))} to decode, in {chunks:.0f} "
            f"chunks of shape {storage.chunk}, again each time that it is drawn; write the file with chunks of whole "
            f"rows, such as {whole}: `moemm data repack OLD NEW`, or h5py's create_dataset(..., chunks={whole})"
        )
