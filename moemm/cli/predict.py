"""`moemm predict`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import Plugins
from moemm.errors import CheckpointError


@dataclass(kw_only=True)
class Predict:
    """Run a trained model on the samples of a data file, and write what it says of each.

    The file may lack labels, split and some modalities; with labels the predictions are scored, too. Needs neither the
    run's own data nor DeepSpeed.
    """

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Folder of a run, a checkpoint of one, or a folder that `moemm export` wrote."""
    data: Annotated[Path, arg(metavar="FILE")]
    """HDF5 file in moemm's format."""
    task: Annotated[str | None, arg(metavar="NAME")] = None
    """Task of the model whose head answers; that which the file names when not given."""
    split: Literal["all", "train", "val", "test", "ood"] = "all"
    """Samples to predict: all, or those of a split that the file has."""
    output: Annotated[Path | None, arg(metavar="FILE")] = None
    """File to write, by its suffix: .csv or .jsonl, a row a sample; .h5, arrays with all probabilities.
    FILE_predictions.csv in this folder when not given."""
    overwrite: bool = False
    """Write over a file that is there."""
    missing: Annotated[str, arg(metavar="A,B")] = ""
    """Modalities to take away, with commas between them."""
    batch_size: int = 256
    """Samples that pass through the model together."""
    plugin: Plugins = ()
    json: bool = False
    """Print the summary as JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Predict, write and print; 0."""
        del overrides
        from moemm.config.suggest import missing_path

        if not self.run_folder.is_dir():
            raise CheckpointError(missing_path(self.run_folder, what="run folder or export"))
        from moemm import evaluate
        from moemm.train import load

        output = self.output or Path(f"{self.data.stem}_predictions.csv")
        evaluate.check_output(output, overwrite=self.overwrite)  # before the minutes that a large file takes
        names = [name.strip() for name in self.missing.split(",") if name.strip()]
        found = load(self.run_folder, plugins=self.plugin).predict_file(
            self.data, task=self.task, split=self.split, missing=names, batch_size=self.batch_size
        )
        evaluate.write_predictions(found, output, overwrite=self.overwrite)
        summary = {**evaluate.summarize(found), "written": str(output)}
        if self.json:
            show_json(summary)
        else:
            show(evaluate.render_predictions(summary))
            show(f"wrote       {output} ({len(found.index)} rows)")
        return 0
