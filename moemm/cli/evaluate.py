"""`moemm evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.errors import CheckpointError


@dataclass(kw_only=True)
class Evaluate:
    """Score a run's newest complete checkpoint, task by task."""

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Folder of the run: train.output of its configuration."""
    split: Literal["train", "val", "test", "ood"] = "test"
    """Split to score on."""
    drop: Annotated[str, arg(metavar="A,B")] = ""
    """Modalities to take away, with commas between them: what is it worth without them?"""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print the scores; 0."""
        del overrides
        from moemm.config.suggest import missing_path

        if not self.run_folder.is_dir():
            raise CheckpointError(missing_path(self.run_folder, what="run folder"))
        from moemm.evaluate import evaluate_run, render
        from moemm.train import load_run

        drop = tuple(name.strip() for name in self.drop.split(",") if name.strip())
        result = evaluate_run(load_run(self.run_folder), split=self.split, drop=drop)
        if self.json:
            show_json(result)
        else:
            show(render(result))
        return 0
