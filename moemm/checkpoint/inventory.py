"""What lies in a folder of checkpoints, and taking away what is not needed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moemm.checkpoint.commit import Keep, folder_name
from moemm.checkpoint.manifest import Manifest, verify
from moemm.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder of a checkpoint, or of one that was begun. problem: why it is none; manifest: None then.

    step: by its name; size: bytes of all its files.
    """

    folder: Path
    step: int
    size: int
    manifest: Manifest | None
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        found = self.manifest
        written = {} if found is None else {key: asdict(found)[key] for key in ("world_size", "zero_stage", "versions")}
        weights_only = None if found is None else found.weights_only
        return {
            "name": self.folder.name,
            "step": self.step,
            "size": self.size,
            "complete": self.problem is None,
            "problem": self.problem,
            "weights_only": weights_only,
            **written,
        }


def inventory(root: Path, *, hashes: bool) -> list[Entry]:
    """The folders of checkpoints under `root` by step. hashes: read every file; else only its size is compared.

    Raises CheckpointError where there is none.
    """
    folders = [path for path in root.glob("step_*") if path.is_dir() and _step(path) is not None]
    if not folders:
        raise CheckpointError(f"{root} holds no checkpoint. Give train.output of a run that saved one.")
    return sorted((_entry(path, hashes=hashes) for path in folders), key=lambda entry: (entry.step, entry.folder.name))


def superfluous(entries: Sequence[Entry], keep: Keep) -> list[Entry]:
    """Which of them may go so that the newest complete ones stay, and those that `keep.every` keeps.

    Folders that are no checkpoints go too, where a complete one is as new: a newer one may be written right now.
    Raises CheckpointError where none is complete: then none goes.
    """
    complete = [entry for entry in entries if entry.problem is None]
    if not complete:
        raise CheckpointError(
            "None of these checkpoints is complete, so none is taken away; see `moemm checkpoint list`."
        )
    stay = {entry.folder for entry in complete[-keep.newest :]}
    stay |= {entry.folder for entry in complete if keep.every and entry.step % keep.every == 0}
    return [entry for entry in entries if entry.folder not in stay and entry.step <= complete[-1].step]


def remove(entries: Sequence[Entry]) -> None:
    """Take the folders away. Raises CheckpointError."""
    for entry in entries:
        try:
            shutil.rmtree(entry.folder)
        except OSError as error:
            raise CheckpointError(f"cannot remove {entry.folder}: {error.strerror or error}") from error


def _entry(folder: Path, *, hashes: bool) -> Entry:
    step, manifest, problem = _step(folder), None, None
    assert step is not None
    try:
        if folder.name != folder_name(step):
            raise CheckpointError(f"{folder.name} was never completed, or is being written")
        manifest = verify(folder, hashes=hashes)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Entry(folder, step, size, manifest, problem)


def _step(folder: Path) -> int | None:
    digits = folder.name.removeprefix("step_").partition(".")[0]
    return int(digits) if digits.isdecimal() else None
