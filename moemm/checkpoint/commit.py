"""The commit protocol: a checkpoint is complete, or it does not exist.

All ranks write into step_N.tmp, sync and hash their own files; rank 0 writes the manifest as the last file, renames the
folder, syncs its parent, reads everything back, and only then moves `latest` and removes older checkpoints. Every rank
learns of every other's failure, and then the new folder is gone and the old ones stand.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moemm.checkpoint.files import sha256_file, sync_file, write_text_atomic
from moemm.checkpoint.manifest import Manifest, verify
from moemm.distributed import World, gather_objects
from moemm.errors import CheckpointError
from moemm.points import point

LATEST = "latest"
_TEMPORARY, _REPLACED = ".tmp", ".old"
_FAILURES = (OSError, RuntimeError)  # torch.save reports a full disk as a RuntimeError

Write = Callable[[Path], Sequence[Path]]
Entries = dict[str, dict[str, Any]]


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps; sorts by step."""
    return f"step_{step:06d}"


def commit(
    root: Path, *, step: int, write: Write, describe: Callable[[Entries], Manifest], world: World, keep: int
) -> Path:
    """Make the checkpoint of `step` under `root`; all ranks call it together. Returns its folder.

    write: writes this rank's files into the given folder and returns their paths.
    describe: the manifest for the files of all ranks (called on rank 0).
    keep: newest complete checkpoints that stay.
    Raises CheckpointError on all ranks if one of them failed; `root` then holds what it held before.
    """
    final = root / folder_name(step)
    temporary = final.with_name(final.name + _TEMPORARY)
    _together(world, lambda: _fresh(temporary, world), temporary)
    entries = _together(world, lambda: _write_own(temporary, write), temporary)
    files = {name: entry for own in entries for name, entry in own.items()}
    _together(world, lambda: _publish(temporary, final, describe(files)) if world.is_main else _wait(), temporary)
    point("save.latest")
    if world.is_main:
        _point_and_prune(root, final, keep)
    return final


def _together(world: World, action: Callable[[], Any], temporary: Path) -> list[Any]:
    """Run `action` on every rank; its results by rank, or on every rank the error of the first that failed."""
    result, problem = None, None
    try:
        result = action()
    except (*_FAILURES, CheckpointError) as error:
        problem = f"rank {world.rank}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"
    outcomes = gather_objects((result, problem))
    problems = [problem for _, problem in outcomes if problem]
    if problems:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"Checkpoint {temporary.name.removesuffix(_TEMPORARY)} was not written ({'; '.join(problems)}). "
            f"What stood in {temporary.parent} before is untouched."
        )
    return [result for result, _ in outcomes]


def _fresh(temporary: Path, world: World) -> None:
    point("save.begin")
    if world.is_main:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
    point("save.folder")


def _write_own(temporary: Path, write: Write) -> Entries:
    entries, paths = {}, write(temporary)
    point("save.written")
    for path in paths:
        sync_file(path)
        name = path.relative_to(temporary).as_posix()
        entries[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    point("save.hashed")
    return entries


def _wait() -> None:
    for name in ("save.manifest", "save.after_manifest", "save.rename", "save.renamed"):
        point(name)  # of rank 0, which the others wait for


def _publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    point("save.manifest")
    manifest.write(temporary)
    point("save.after_manifest")
    for folder in [path for path in temporary.rglob("*") if path.is_dir()]:
        sync_file(folder)
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    point("save.rename")
    os.rename(temporary, final)
    point("save.renamed")
    sync_file(final.parent)
    verify(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _point_and_prune(root: Path, final: Path, keep: int) -> None:
    # The checkpoint stands already: a failure here costs tidiness, not data.
    try:
        write_text_atomic(root / LATEST, final.name + "\n")
        for path in superseded(root, final, keep):
            shutil.rmtree(path)
    except OSError:
        pass


def superseded(root: Path, newest: Path, keep: int) -> Iterable[Path]:
    """What may go once `newest` is verified: left-overs of cut-off saves, and all but the `keep` newest up to it."""
    folders = sorted(path for path in root.glob("step_*") if path.is_dir())
    left_over = [path for path in folders if path.suffix in (_TEMPORARY, _REPLACED)]
    done = [path for path in folders if path not in left_over and path.name <= newest.name]
    return [*left_over, *done[: max(0, len(done) - keep)]]
