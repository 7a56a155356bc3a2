"""`moemm checkpoint list`, `verify` and `prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moemm.checkpoint.inventory import Entry

Run = Annotated[Positional[Path], arg(name="run", metavar="RUN")]
_MIB = 2**20


@dataclass(kw_only=True)
class List:
    """The checkpoints of a run: step, size, what wrote them, and which are complete. Reads no hashes: see verify."""

    run_folder: Run
    """Folder of the run."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print them; 0."""
        del overrides
        _print(_read(self.run_folder, hashes=False), json=self.json)
        return 0


@dataclass(kw_only=True)
class Verify:
    """Read every byte of a run's checkpoints and compare the hashes. Exit code 1 where one is not as it was written."""

    run_folder: Run
    """Folder of the run."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print what was found; 0, or 1 where a checkpoint is not complete."""
        del overrides
        entries = _read(self.run_folder, hashes=True)
        _print(entries, json=self.json)
        return int(any(entry.problem for entry in entries))


@dataclass(kw_only=True)
class Prune:
    """Take away older checkpoints of a run, once the hashes of those that stay were verified, and left-overs of saves.

    A folder newer than the newest complete checkpoint stays: a run may be writing it.
    """

    run_folder: Run
    """Folder of the run."""
    keep: int = 2
    """Newest complete checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints of steps that are multiples of this stay, too; 0: none does."""
    dry_run: bool = False
    """Only say what would go."""

    def run(self, overrides: Sequence[str]) -> int:
        """Remove them, and print what went; 0."""
        del overrides
        if self.keep < 1 or self.keep_every < 0:
            raise ConfigError(f"--keep {self.keep} --keep-every {self.keep_every}: allowed are 1 and more, 0 and more")
        from moemm.checkpoint import Keep
        from moemm.checkpoint.inventory import remove, superfluous

        entries = _read(self.run_folder, hashes=True)
        going = superfluous(entries, Keep(self.keep, self.keep_every))
        if not self.dry_run:
            remove(going)
        verb = "would remove" if self.dry_run else "removed"
        for entry in going:
            show(f"{verb} {entry.folder}  {entry.size / _MIB:.1f} MiB{f'  ({entry.problem})' if entry.problem else ''}")
        freed = sum(entry.size for entry in going) / _MIB
        show(f"{verb} {len(going)} of {len(entries)}, {freed:.1f} MiB")
        return 0


def _read(run: Path, *, hashes: bool) -> list[Entry]:
    from moemm.checkpoint.inventory import inventory
    from moemm.config.suggest import missing_path

    if not run.is_dir():
        raise CheckpointError(missing_path(run, what="run folder"))
    return inventory(run / "checkpoints", hashes=hashes)


def _print(entries: Sequence[Entry], *, json: bool) -> None:
    if json:
        show_json([entry.to_dict() for entry in entries])
        return
    from rich.table import Table

    table = Table()
    for title in ("step", "MiB", "ranks", "ZeRO", "moemm"):
        table.add_column(title, justify="right")
    table.add_column("")
    for entry in entries:
        table.add_row(*_row(entry), entry.problem or _what(entry))
    show(table)


def _row(entry: Entry) -> list[str]:
    found: Any = entry.manifest
    written = ["", "", ""] if found is None else [found.world_size, found.zero_stage, found.versions.get("moemm", "")]
    return [str(entry.step), f"{entry.size / _MIB:.1f}", *map(str, written)]


def _what(entry: Entry) -> str:
    assert entry.manifest is not None
    return "complete, weights alone" if entry.manifest.weights_only else "complete"
