"""`moemm export`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moemm.cli.output import show
from moemm.errors import CheckpointError


@dataclass(kw_only=True)
class Export:
    """Write a trained model as one folder: weights, configuration, vocabularies, tasks, expert map. Nothing is pickled.

    `moemm.load(OUT)` predicts with it, `train.init: OUT` begins with it; neither needs the run or its data.
    """

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Run folder, whose newest complete checkpoint is taken, or one of its checkpoints."""
    output: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write, which must not be there."""

    def run(self, overrides: Sequence[str]) -> int:
        """Write it; 0."""
        del overrides
        from moemm.config.suggest import missing_path

        if not self.run_folder.is_dir():
            raise CheckpointError(missing_path(self.run_folder, what="run folder"))
        from moemm.train import export_run

        manifest = export_run(self.run_folder, self.output)
        size = sum(entry["size"] for entry in manifest.files.values())
        show(f"wrote {self.output} (step {manifest.step}, {len(manifest.files)} files, {size / 2**20:.1f} MiB)")
        show(f"to predict  moemm predict {self.output} --data FILE")
        show(f"            in Python: moemm.load({str(self.output)!r})")
        return 0
