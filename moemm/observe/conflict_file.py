"""What `moemm analyze conflict` leaves in a run folder: a file that the report reads, and scalars for TensorBoard."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemm.checkpoint.files import write_text_atomic
from moemm.errors import CheckpointError

FOLDER, FILE, SPLIT = "conflict", "conflict.json", "split.yaml"
_KEYS = {"losses", "steps", "parts", "modalities", "lasting", "remedies", "batches", "samples"}


def write_conflict(folder: Path, values: Mapping[str, Any]) -> Path:
    """conflict/conflict.json and tensorboard/conflict/ of the run `folder`, in place of those of the last analysis.

    TensorBoard: `layer_conflict/PART/A | B`, the mean cosine, by step of the checkpoint. Returns the file's path.
    Raises CheckpointError where they cannot be written.
    """
    path = folder / FOLDER / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(values, indent=1) + "\n")
        _write_scalars(folder / "tensorboard" / FOLDER, values)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_conflict(folder: Path) -> dict[str, Any] | None:
    """What write_conflict left in a run folder; None if nothing. Raises CheckpointError for another file there."""
    path = folder / FOLDER / FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lacking = sorted(_KEYS - set(values))
        if lacking:
            raise ValueError(f"it lacks {', '.join(lacking)}")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); delete it, or make it anew: moemm analyze conflict {folder}"
        ) from error
    return values


def _write_scalars(folder: Path, values: Mapping[str, Any]) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.*"):
        old.unlink()
    writer: Any = SummaryWriter(str(folder))
    for entry in values["parts"]:
        tag = f"layer_conflict/{entry['title'].replace(' ', '_')}/{' | '.join(entry['losses'])}"
        for step, cos in zip(values["steps"], entry["cos"], strict=True):
            if cos is not None:
                writer.add_scalar(tag, cos, step)
    writer.close()
