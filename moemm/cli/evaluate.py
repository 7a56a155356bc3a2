"""`moemm evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import Plugins
from moemm.errors import CheckpointError


@dataclass(kw_only=True)
class Evaluate:
    """Score a run's newest complete checkpoint, task by task."""

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Folder of the run: train.output of its configuration."""
    split: Literal["train", "val", "test", "ood"] = "test"
    """Split to score on."""
    missing: Annotated[str, arg(metavar="A,B|all")] = ""
    """Modalities to take away, with commas between them; `all`: every subset, as a table, CSV and plot in the run's
    folder."""
    plugin: Plugins = ()
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

        names = tuple(name.strip() for name in self.missing.split(",") if name.strip())
        missing: Any = "all" if names == ("all",) else names
        result = evaluate_run(load_run(self.run_folder, plugins=self.plugin), split=self.split, missing=missing)
        if self.json:
            show_json(result)
        else:
            show(render(result))
        if missing == "all":
            self._write(result)
        return 0

    def _write(self, result: dict[str, Any]) -> None:
        """missing.csv, missing.png and missing.svg in the run's folder; says so where no JSON is printed."""
        from moemm.checkpoint.files import write_text_atomic
        from moemm.evaluate import subsets_csv
        from moemm.observe.plots import missing_figure, save_figure

        table = self.run_folder / "missing.csv"
        try:
            write_text_atomic(table, subsets_csv(result))
            written = [table, *save_figure(missing_figure(result), self.run_folder / "missing")]
        except OSError as error:
            raise CheckpointError(
                f"cannot write the scores into {self.run_folder}: {error.strerror or error}\n"
                "  to do: make the folder writable, or copy the run and evaluate the copy"
            ) from error
        if not self.json:
            show(f"wrote {', '.join(map(str, written))}")
