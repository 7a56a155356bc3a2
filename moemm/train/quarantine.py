"""quarantine.jsonl of a run: the samples that were put aside, of all ranks, and when they are too many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from moemm.data.quarantine import Bad
from moemm.distributed import World, broadcast_object, gather_objects, on_main
from moemm.errors import DataError

FILE_NAME = "quarantine.jsonl"
SHARE = 0.01
_SHOWN = 3


class Quarantine:
    """The samples of a run that were put aside; the same on all ranks, which make it and add to it together.

    samples: of the train splits, of which at most SHARE may be broken, and one in any case.
    """

    def __init__(self, folder: Path, world: World, *, samples: int) -> None:
        self._path, self._world, self._samples = folder / FILE_NAME, world, samples
        self._known: dict[tuple[str, int], str] = broadcast_object(_read(self._path) if world.is_main else {})

    def __len__(self) -> int:
        return len(self._known)

    def add(self, found: Sequence[Bad], *, step: int) -> str:
        """Put aside what the ranks found in `step`; a message on those that are new, or an empty text.

        Raises DataError on all ranks where they are too many, or cannot be written down.
        """
        new: dict[tuple[str, int], Bad] = {}
        for bad in (bad for rank in gather_objects(list(found)) for bad in rank):
            if (bad.file, bad.index) not in self._known:
                new.setdefault((bad.file, bad.index), bad)
        self._known |= {key: bad.reason for key, bad in new.items()}
        on_main(lambda: self._write(list(new.values()), step))
        if len(self._known) > max(1, SHARE * self._samples):
            raise self._too_many(next(iter(self._known)))
        if not new:
            return ""
        shown = "".join(
            f"\n  {bad.file}: {bad.key}: sample {bad.index}: {bad.reason}; sample {bad.by} stands in for it"
            for bad in list(new.values())[:_SHOWN]
        )
        return f"warning: step {step}: {len(new)} broken sample(s) put aside, {len(self)} in all ({self._path}):{shown}"

    def _write(self, new: Sequence[Bad], step: int) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                for bad in new:
                    file.write(json.dumps({**asdict(bad), "step": step}) + "\n")
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written: {error}\n  to do: free space, then --resume") from error

    def _too_many(self, first: tuple[str, int]) -> DataError:
        file, index = first
        return DataError(
            f"{len(self)} of the {self._samples} training samples are broken, the first of them sample {index} of "
            f"{file}: {self._known[first]}\n"
            f"  allowed: {SHARE:.0%}, which others stand in for; {self._path} lists them\n"
            "  to do: check the files with `moemm data validate`; fetch them again, or leave these samples out"
        )


def _read(path: Path) -> dict[tuple[str, int], str]:
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            found[values["file"], values["index"]] = values["reason"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that a killed run was writing
    return found
