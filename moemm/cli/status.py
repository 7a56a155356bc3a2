"""`moemm status`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.errors import CheckpointError


@dataclass(kw_only=True)
class Status:
    """Say whether a run goes on, how far it is, and what went wrong on the way; reads files of its folder only.

    Exit code 0: running, finished, or stopped by a signal; 1: it looks dead, or ended with an error; 4: no run there.
    """

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Folder of the run: train.output of its configuration."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0 where nobody need look, else 1."""
        del overrides
        from moemm.config.suggest import missing_path
        from moemm.observe.status import GOOD, run_status, status_lines

        if not self.run_folder.is_dir():
            raise CheckpointError(missing_path(self.run_folder, what="run folder"))
        status = run_status(self.run_folder)
        if self.json:
            show_json(status)
        else:
            show("\n".join(status_lines(status)))
        return 0 if status["state"] in GOOD else 1
