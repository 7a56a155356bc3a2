"""Scoring a trained run: each task on a split, and beside it the same with modalities taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from moemm.config import Config
from moemm.data.catalogue import Catalogue
from moemm.evaluate.missing import evaluate_subsets, render_subsets
from moemm.evaluate.scoring import EvaluationPlan, evaluate_model, scores_to_dict
from moemm.modalities import ModalitySpec, prepare_functions

if TYPE_CHECKING:
    from rich.table import Table


class TrainedRun(Protocol):
    """What moemm.train.load_run gives."""

    @property
    def config(self) -> Config:
        """The run's configuration."""
        ...

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


def evaluate_run(
    run: TrainedRun, *, split: str = "test", missing: Sequence[str] | Literal["all"] = ()
) -> dict[str, Any]:
    """Scores of a run on a split: {"run", "step", "split", "missing", "tasks": {name: {"metric", "value", "n", ...}}}.

    missing: modalities to take away; each task then also has "complete", its value with all modalities, and "value" is
    None where none is left. "all": every subset of a task's modalities, with the tasks as evaluate_subsets gives them.
    Raises ConfigError for a modality that the run lacks, DataError for a split without samples of a task.
    """
    device = next(run.model.parameters()).device
    plan = EvaluationPlan(split=split, prepare=prepare_functions(run.specs), device=device)
    result = {"run": str(run.folder), "step": run.step, "split": split}
    if missing == "all":
        return {**result, "missing": "all", "tasks": evaluate_subsets(run.model, run.catalogue, plan)}

    def scores(without: Sequence[str]) -> dict[str, dict[str, Any]]:
        return scores_to_dict(evaluate_model(run.model, run.catalogue, replace(plan, drop=tuple(without))))

    tasks = scores(missing)
    if missing:
        for name, complete in scores(()).items():
            tasks[name]["complete"] = complete["value"]
    return {**result, "missing": list(missing), "tasks": tasks}


def render(result: Mapping[str, Any]) -> Table:
    """The result of evaluate_run as a table for the terminal."""
    from rich.table import Table

    missing = result["missing"]
    if missing == "all":
        return render_subsets(result)
    table = Table(title=f"{result['run']}, step {result['step']}: {result['split']} split", title_justify="left")
    table.add_column("task")
    table.add_column("metric")
    columns = ["all modalities", f"without {', '.join(missing)}"] if missing else [result["split"]]
    for title in [*columns, "samples"]:
        table.add_column(title, justify="right")
    for name, task in result["tasks"].items():
        values = [task["complete"], task["value"]] if missing else [task["value"]]
        cells = ["none left" if value is None else f"{value:.3f}" for value in values]
        table.add_row(name, task["metric"], *cells, str(task["n"]))
    return table
