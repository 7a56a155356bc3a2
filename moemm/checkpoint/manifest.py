"""The manifest: what a checkpoint consists of. A folder without one that verifies is no checkpoint.

Hashes show that the files are whole and as they were written, not who wrote them.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from moemm.checkpoint.files import sha256_file, write_text_atomic
from moemm.errors import CheckpointError

FORMAT = 2
FILE_NAME = "manifest.json"
_OPTIMIZER = "optimizer_"
_SEAL = "sha256"
_PACKAGES = ("moemm", "torch", "deepspeed", "numpy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that resuming must know before it opens another file.

    world_size: ranks that wrote it; 0 where an operation on models did, so that no rank has random states there.
    sampler: position in the data; the order is a pure function of it, so one number a sampler.
    files: path inside the folder -> {"size": bytes, "sha256": hex}.
    """

    step: int
    world_size: int
    zero_stage: int
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]
    sampler: dict[str, int]
    expert_map: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    format: int = FORMAT

    @property
    def weights_only(self) -> bool:
        """Whether it has no state of an optimizer: any number of ranks and any ZeRO stage can go on from it."""
        return not any(name.startswith(_OPTIMIZER) for name in self.files)

    def write(self, folder: Path) -> None:
        """Write it into `folder`, as the last file. Raises OSError."""
        values = asdict(self)
        sealed = {**values, _SEAL: _digest(values)}
        write_text_atomic(folder / FILE_NAME, json.dumps(sealed, indent=1, sort_keys=True) + "\n")


def versions() -> dict[str, str]:
    """Versions that a run depends on: python and the packages that compute."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, its form checked, its files not yet.

    Raises CheckpointError that says what is wrong with it.
    """
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name} has no {FILE_NAME}: it was never completed") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder.name}/{FILE_NAME} cannot be read: {error}") from error
    return _from_values(values, folder.name)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _from_values(values: Any, name: str) -> Manifest:
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{name}/{FILE_NAME} {_foreign(values)}")
    values = dict(values)
    if values.pop(_SEAL, None) != _digest(values):
        raise CheckpointError(f"{name}/{FILE_NAME} does not match its own sha256: it was altered")
    names = {field.name for field in fields(Manifest)}
    if set(values) != names:
        raise CheckpointError(f"{name}/{FILE_NAME} lacks or adds keys: {', '.join(sorted(names ^ set(values)))}")
    _check_files(values["files"], name)
    return Manifest(**values)


def _foreign(values: Any) -> str:
    """What a manifest of another format says of itself, and what to do."""
    given = values.get("format") if isinstance(values, Mapping) else type(values).__name__
    packages = values.get("versions") if isinstance(values, Mapping) else None
    writer = packages.get("moemm") if isinstance(packages, Mapping) else None
    by = f", written by moemm {writer}" if isinstance(writer, str) else ""
    do = f"go on with moemm {writer}, or train anew" if by else "train anew"
    return f"has format {given}{by}; this version of moemm reads format {FORMAT}: {do} in another folder"


def _check_files(files: Any, name: str) -> None:
    if not isinstance(files, Mapping):
        raise CheckpointError(f"{name}/{FILE_NAME}: files must be a mapping, not {type(files).__name__}")
    for path, entry in files.items():
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise CheckpointError(f"{name}/{FILE_NAME} names a file outside its folder: {path}")
        if not isinstance(entry, Mapping) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(f"{name}/{FILE_NAME}: {path} must have size and sha256")


def verify(folder: Path, *, hashes: bool = True) -> Manifest:
    """Read the manifest and check size and hash of every file that it lists, and that there is no other.

    hashes: False leaves them out, so that no file is read.

    Opens no file as anything but bytes. Raises CheckpointError that names the first file that is wrong, and how.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise CheckpointError(f"{folder.name}/{name} is missing")
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"{folder.name}/{name} has {size} bytes, not {entry['size']}: it was cut short or altered"
            )
        if hashes and sha256_file(path) != entry["sha256"]:
            raise CheckpointError(f"{folder.name}/{name} has the wrong sha256: its content was altered")
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    extra = sorted(present - set(manifest.files) - {FILE_NAME})
    if extra:
        raise CheckpointError(f"{folder.name}/{extra[0]} is not in the manifest")
    return manifest
