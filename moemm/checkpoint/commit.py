"""The commit protocol: a checkpoint is complete, or it does not exist.

All ranks write into step_N.tmp, sync and hash their own files; rank 0 writes the manifest as the last file, renames the
folder, syncs its parent, reads everything back, and only then moves `latest` and removes older checkpoints. Every rank
learns of every other's failure, and then the new folder is gone and the old ones stand.

A save has two parts that take long, the files of each rank and the publishing by rank 0; after each all ranks agree. In
the background both run in a thread, and the agreements come when the caller says that every rank is done.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemm.checkpoint.files import sha256_file, sync_file, write_text_atomic
from moemm.checkpoint.manifest import Manifest, verify
from moemm.distributed import World, gather_objects
from moemm.errors import CheckpointError
from moemm.points import point

LATEST = "latest"
TEMPORARY, _REPLACED = ".tmp", ".old"
_FAILURES = (OSError, RuntimeError, CheckpointError)

Write = Callable[[Path], Sequence[Path]]
Entries = dict[str, dict[str, Any]]


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps; sorts by step."""
    return f"step_{step:06d}"


@dataclass(frozen=True, slots=True)
class Keep:
    """Which complete checkpoints stay: the `newest`, and those of steps that are multiples of `every`, if not 0."""

    newest: int
    every: int = 0


def commit(
    root: Path, *, step: int, write: Write, describe: Callable[[Entries], Manifest], world: World, keep: Keep
) -> Path:
    """Make the checkpoint of `step` under `root`; all ranks call it together. Returns its folder.

    write: writes this rank's files into the given folder and returns their paths.
    describe: the manifest for the files of all ranks (called on rank 0).
    Raises CheckpointError on all ranks if one of them failed; `root` then holds what it held before.
    """
    return Save(root, step=step, write=write, describe=describe, world=world, keep=keep).finish()


class Save:
    """A checkpoint that is being made; arguments as those of `commit`, which is this without a background.

    background: `write` runs in a thread from here on, and must touch nothing that training moves.
    """

    def __init__(
        self,
        root: Path,
        *,
        step: int,
        write: Write,
        describe: Callable[[Entries], Manifest],
        world: World,
        keep: Keep,
        background: bool = False,
    ) -> None:
        """All ranks together. Raises CheckpointError on all of them."""
        self.folder = root / folder_name(step)
        self._temporary = self.folder.with_name(self.folder.name + TEMPORARY)
        self._describe, self._world, self._keep, self._background = describe, world, keep, background
        self._published = False
        self._agree(_Task(lambda: _fresh(self._temporary, world)))
        self._task = _Task(lambda: _write_own(self._temporary, write), background=background)

    @property
    def busy(self) -> bool:
        """Whether this rank has something under way; once no rank has, `advance` will not wait."""
        return self._task.running

    def advance(self) -> bool:
        """Agree on the part that is under way and begin the next one; all ranks together. True once all is done.

        Raises CheckpointError on all ranks if one of them failed; the save is over then.
        """
        found = self._agree(self._task)
        if self._published:
            return True
        files = {name: entry for own in found for name, entry in own.items()}
        self._task = _Task(lambda: self._publish(files), background=self._background and self._world.is_main)
        self._published = True
        return False

    def finish(self) -> Path:
        """Wait for the rest; all ranks together. Returns the checkpoint's folder. Raises as `advance`."""
        while not self.advance():
            pass
        return self.folder

    def _publish(self, files: Entries) -> None:
        if self._world.is_main:
            _publish(self._temporary, self.folder, self._describe(files))
        else:
            _wait()
        point("save.latest")
        if self._world.is_main:
            _point_and_prune(self.folder.parent, self.folder, self._keep)

    def _agree(self, task: _Task) -> list[Any]:
        """Results of a part by rank, or on every rank the error of all that failed."""
        result, problem = task.outcome()
        outcomes = gather_objects((result, None if problem is None else f"rank {self._world.rank}: {problem}"))
        problems = [problem for _, problem in outcomes if problem]
        if problems:
            if self._world.is_main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise CheckpointError(
                f"Checkpoint {self.folder.name} was not written ({'; '.join(problems)}). "
                f"What stood in {self.folder.parent} before is untouched."
            )
        return [result for result, _ in outcomes]


class _Task:
    """An action that runs at once, or in a thread; what came of it, or why it failed."""

    def __init__(self, action: Callable[[], Any], *, background: bool = False) -> None:
        self._action, self._result, self._problem = action, None, ""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run_aside, name="checkpoint", daemon=True) if background else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def outcome(self) -> tuple[Any, str | None]:
        """The action's result, and why it failed, if it did. Waits for it; raises what it should not have raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result, self._problem or None

    def _run(self) -> None:
        try:
            self._result = self._action()
        except _FAILURES as error:
            said = str(error) or repr(error)
            self._problem = f"{type(error).__name__}: {said.splitlines()[0]}"

    def _run_aside(self) -> None:
        try:
            self._run()
        except BaseException as error:  # the caller's thread raises it
            self._error = error


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


def _point_and_prune(root: Path, final: Path, keep: Keep) -> None:
    # The checkpoint stands already: a failure here costs tidiness, not data.
    try:
        write_text_atomic(root / LATEST, final.name + "\n")
        for path in superseded(root, final, keep):
            shutil.rmtree(path)
    except OSError:
        pass


def superseded(root: Path, newest: Path, keep: Keep) -> Iterable[Path]:
    """What may go once `newest` is verified: left-overs of cut-off saves, and those up to it that need not be kept."""
    folders = sorted(path for path in root.glob("step_*") if path.is_dir())
    left_over = [path for path in folders if path.suffix in (TEMPORARY, _REPLACED)]
    done = [path for path in folders if path not in left_over and path.name <= newest.name]
    old = done[: max(0, len(done) - keep.newest)]
    return [*left_over, *(path for path in old if not _for_ever(path, keep.every))]


def _for_ever(folder: Path, every: int) -> bool:
    step = folder.name.removeprefix("step_")
    return bool(every) and step.isdigit() and int(step) % every == 0
