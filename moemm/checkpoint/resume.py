"""Which checkpoint to go on from, and whether it fits this run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemm.checkpoint.commit import TEMPORARY
from moemm.checkpoint.manifest import Manifest, verify
from moemm.config import to_dict
from moemm.config.schema import Config
from moemm.distributed import on_main
from moemm.errors import CheckpointError

_FIXED = ("model.", "modalities.", "objectives.", "data.tasks.", "train.precision", "train.only", "harmonize.scale")
"""What decides shapes and meaning of the weights and of the optimizer's states: it may not change until a resume."""
_FREE = ("model.experts.backend",)
"""Keys below those that change no meaning: they choose who computes the same."""
_OF_OPTIMIZER = ("train.only", "train.precision")
"""Keys that may change where a checkpoint has weights alone."""
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Found:
    """The newest complete checkpoint. skipped: newer folders that are none, as (name, reason)."""

    folder: Path
    manifest: Manifest
    skipped: tuple[tuple[str, str], ...]


def nothing_completed(root: Path) -> tuple[str, ...] | None:
    """Names of the saves under `root`, newest first, where all of them were cut off; None where one was completed."""
    names = sorted((path.name for path in root.glob("step_*")), reverse=True)
    return tuple(names) if all(name.endswith(TEMPORARY) for name in names) else None


def newest_complete(root: Path) -> Found:
    """The newest folder under `root` whose manifest verifies; the file `latest` is not asked.

    Raises CheckpointError that names every folder and what is wrong with it, when there is none.
    """
    skipped: list[tuple[str, str]] = []
    for folder in sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True):
        try:
            if folder.suffix:
                raise CheckpointError(f"{folder.name} was never completed")
            return Found(folder, verify(folder), tuple(skipped))
        except (CheckpointError, OSError) as error:
            skipped.append((folder.name, str(error)))
    reasons = "".join(f"\n  {reason}" for _, reason in skipped) or " There is none at all."
    raise CheckpointError(
        f"No complete checkpoint in {root}.{reasons}\nTrain anew in another folder (--train.output NAME), "
        "or put back the files of a checkpoint from a copy."
    )


def find_newest(root: Path, *, check: Callable[[Manifest], None]) -> Found:
    """`newest_complete` and `check`, done by rank 0 for all ranks (they share `root`). Raises on all ranks alike."""

    def find() -> Found:
        found = newest_complete(root)
        check(found.manifest)
        return found

    return on_main(find)


def check_compatible(manifest: Manifest, config: Config) -> None:
    """Refuse to load a checkpoint of another model. World size, ZeRO stage and what DeepSpeed is told may change.

    Raises CheckpointError that names the keys that changed, with both values.
    """
    changed = changed_keys(manifest.config, to_dict(config))
    free = (*_FREE, *_OF_OPTIMIZER) if manifest.weights_only else _FREE
    fixed = [line for key, line in changed.items() if key.startswith(_FIXED) and key not in free]
    where = f"the checkpoint of step {manifest.step}"
    if fixed:
        shown = "".join(f"\n  {line}" for line in fixed[:_SHOWN])
        more = f"\n  and {len(fixed) - _SHOWN} more" if len(fixed) > _SHOWN else ""
        raise CheckpointError(
            f"The configuration differs from that of {where} in what its weights mean:{shown}{more}\n"
            "Give the old values to resume, or train anew in another folder (--train.output NAME)."
        )


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> `key: was OLD, is NEW`, for each value that differs or stands on one side only."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [*before, *(key for key in after if key not in before)]
    none = "not there"
    return {
        key: f"{key}: was {before.get(key, none)!r}, is {after.get(key, none)!r}"
        for key in keys
        if before.get(key, none) != after.get(key, none)
    }


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        items = [(str(position), inner) for position, inner in enumerate(value)]
    else:
        return [(prefix, value)]
    return [pair for key, inner in items for pair in _flat(inner, f"{prefix}.{key}" if prefix else key)]
