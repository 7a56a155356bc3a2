"""Scoring a trained run: each task on a split, and beside it the same with modalities taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import nn

from moemm.data.catalogue import Catalogue
from moemm.evaluate.scoring import EvaluationPlan, evaluate_model, scores_to_dict
from moemm.modalities import ModalitySpec, prepare_functions

if TYPE_CHECKING:
    from rich.table import Table


class TrainedRun(Protocol):
    """What moemm.train.load_run gives."""

    @property
    def catalogue(self) -> Catalogue:
        """Tasks and modalities."""
        ...

    @property
    def specs(self) -> Mapping[str, ModalitySpec]:
        """Specs of the modalities, in order."""
        ...

    @property
    def model(self) -> nn.Module:
        """The model, in eval mode."""
        ...

    @property
    def folder(self) -> Path:
        """The run folder."""
        ...

    @property
    def step(self) -> int:
        """Optimizer steps that the weights have had."""
        ...


def evaluate_run(run: TrainedRun, *, split: str = "test", drop: Sequence[str] = ()) -> dict[str, Any]:
    """Scores of a run on a split: {"run", "step", "split", "drop", "tasks": {name: {"metric", "value", "n", ...}}}.

    With `drop`, each task also has "complete", its value with all modalities; "value" is None where none is left.
    Raises ConfigError for a modality that the run lacks, DataError for a split without samples of a task.
    """
    prepare = prepare_functions(run.specs)
    device = next(run.model.parameters()).device

    def scores(without: Sequence[str]) -> dict[str, dict[str, Any]]:
        plan = EvaluationPlan(split=split, prepare=prepare, drop=tuple(without), device=device)
        return scores_to_dict(evaluate_model(run.model, run.catalogue, plan))

    tasks = scores(drop)
    if drop:
        for name, complete in scores(()).items():
            tasks[name]["complete"] = complete["value"]
    return {"run": str(run.folder), "step": run.step, "split": split, "drop": list(drop), "tasks": tasks}


def render(result: Mapping[str, Any]) -> Table:
    """The result of evaluate_run as a table for the terminal."""
    from rich.table import Table

    drop = result["drop"]
    table = Table(title=f"{result['run']}, step {result['step']}: {result['split']} split", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    columns = ["all modalities", f"without {', '.join(drop)}"] if drop else [result["split"]]
    for title in [*columns, "samples"]:
        table.add_column(title, justify="right")
    for name, task in result["tasks"].items():
        values = [task["complete"], task["value"]] if drop else [task["value"]]
        cells = ["none left" if value is None else f"{value:.3f}" for value in values]
        table.add_row(name, task["metric"], *cells, str(task["n"]))
    return table
