"""`moemm data inspect`, `moemm data validate` and `moemm data repack`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moemm.cli.output import show
from moemm.errors import DataError


@dataclass(kw_only=True)
class Inspect:
    """Print what a data file holds: modalities, kinds, shapes, lengths, splits, classes, missing share, licence."""

    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """HDF5 file in moemm's format."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0."""
        del overrides
        _require(self.file)
        from moemm.data import inspect_file

        show(inspect_file(self.file))
        return 0


@dataclass(kw_only=True)
class Validate:
    """Check data files from end to end: structure, sizes, checksums, labels, splits."""

    files: Positional[Annotated[tuple[Path, ...], arg(metavar="FILE...")]]
    """HDF5 files in moemm's format."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print a report for each; 0 if all are in order, else the exit code of a DataError."""
        del overrides
        if not self.files:
            raise DataError("moemm data validate: no file given; usage: moemm data validate FILE...")
        return max(_validate(path) for path in self.files)


@dataclass(kw_only=True)
class Repack:
    """Write a data file again: checksums on everything, chunks of whole samples; every value stays as it is.

    Needs the memory of the decoded file.
    """

    old: Positional[Annotated[Path, arg(metavar="OLD")]]
    """HDF5 file in moemm's format."""
    new: Positional[Annotated[Path, arg(metavar="NEW")]]
    """File to write; there must be none yet."""

    def run(self, overrides: Sequence[str]) -> int:
        """Write it and print what came of it; 0."""
        del overrides
        _require(self.old)
        if self.new.exists():
            raise DataError(f"{self.new}: is there already\n  to do: give another name, or remove it first")
        from moemm.data import repack_file
        from moemm.data.limits import size

        info = repack_file(self.old, self.new)
        before, after = (size(path.stat().st_size) for path in (self.old, self.new))
        show(f"{self.new}: {info.num_samples} samples, {after}; {self.old} has {before}")
        return 0


def _validate(path: Path) -> int:
    """0 or 3; a file that cannot be opened at all is reported like any other, so that the rest are still checked."""
    try:
        _require(path)
        from moemm.data import validate_file

        report = validate_file(path)
    except DataError as error:
        show(f"{path}: refused\n  {error}")
        return DataError.exit_code
    show("\n".join([f"{path}: {'in order' if report.ok else 'problems'}", *(f"  {line}" for line in report.lines)]))
    return 0 if report.ok else DataError.exit_code


def _require(path: Path) -> None:
    from moemm.config.suggest import missing_path

    if not path.exists():
        raise DataError(missing_path(path, what="data file"))
