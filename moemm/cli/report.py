"""`moemm report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from moemm.cli.output import show
from moemm.cli.subject import Plugins
from moemm.errors import CheckpointError


@dataclass(kw_only=True)
class Report:
    """Write one HTML file about a finished run: who uses which expert, curves, missing modalities, cost, reuse.

    It needs no network and no script. On the quickstart it takes a minute, most of it for scoring the test split again
    with each expert switched off.
    """

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Folder of the run: train.output of its configuration."""
    output: Annotated[Path | None, arg(metavar="FILE")] = None
    """File to write; report.html in the run folder if not given."""
    quick: bool = False
    """Leave out what needs evaluation; needs neither the data nor a checkpoint."""
    plugin: Plugins = ()

    def run(self, overrides: Sequence[str]) -> int:
        """Write it; 0."""
        del overrides
        from moemm.config.suggest import missing_path

        if not self.run_folder.is_dir():
            raise CheckpointError(missing_path(self.run_folder, what="run folder"))
        output = self.output or self.run_folder / "report.html"
        if output.is_dir():
            raise CheckpointError(f"--output: {output} is a folder; give the name of a file in it")
        from moemm.observe.report import build_report, read_summary, write_report
        from moemm.train import load_outline, load_run

        read_summary(self.run_folder)  # refuse an unfinished run before its data is opened
        run = (load_outline if self.quick else load_run)(self.run_folder, plugins=self.plugin)
        html = build_report(run, quick=self.quick, tell=show)
        write_report(html, output)
        show(f"wrote {output} ({len(html.encode()) / 1024:.0f} KiB): open it in a browser")
        return 0
