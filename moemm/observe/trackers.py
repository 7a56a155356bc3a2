"""Weights & Biases and MLflow, given what TensorBoard is given. Their packages are imported when a run begins.

Both are optional. The names and arguments that are used of them are those of their documentation:
https://docs.wandb.ai/ref/python (init, define_metric, log, summary, finish) and
https://mlflow.org/docs/latest/api_reference/python_api/mlflow.html (set_experiment, start_run, log_params, log_metrics,
end_run).
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from moemm.errors import ConfigError
from moemm.observe.heartbeat import write_atomically
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.scalars import scalars_of, scalars_of_scores

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""Module, as the key of `observe` is named too -> what pip calls it."""
IDENTITY = "tracker_{name}.txt"
"""File of a run folder that holds the number which a tracker knows the run by: a resume goes on with that."""
_AT_ONCE = 100
"""Parameters a message to an MLflow server may hold."""
_UNNAMEABLE = re.compile(r"[^\w\-. :/]")


def check_installed(name: str) -> None:
    """Raises ConfigError with the line to type where the package of `observe.NAME` is not there."""
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"observe.{name} is set, but the package {name} is not installed here\n"
            f"  to do: pip install {PACKAGES[name]}, or leave observe.{name} out"
        )


class WandbTracker:
    """A run of Weights & Biases. project: of it. WANDB_MODE, WANDB_API_KEY and others are the library's own."""

    def __init__(self, project: str, info: RunInfo) -> None:
        self._names = info.routing
        folder, known = Path(info.folder), _identity(info, "wandb")
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project, name=info.name, dir=str(folder), config=_config(folder), id=known, resume="allow"
        )
        _remember(info, "wandb", str(self._run.id))
        # The library's own steps must never fall; ours do when a resume goes back to a checkpoint.
        self._run.define_metric("*", step_metric="step")

    def metrics(self, metrics: Metrics) -> None:
        """A report."""
        self._run.log({"step": metrics.step, **scalars_of(metrics, self._names)})

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """An evaluation."""
        self._run.log({"step": step, **scalars_of_scores(split, scores)})

    def message(self, text: str) -> None:
        """Nothing: the library takes down what is printed."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The final scores."""
        for split in ("val", "test"):
            for task, values in summary["tasks"].items():
                self._run.summary[f"final_{split}/{task}"] = values[split]

    def close(self) -> None:
        """End of this process' part."""
        self._run.finish()


class MlflowTracker:
    """A run of MLflow. experiment: of it. MLFLOW_TRACKING_URI and others are the library's own."""

    def __init__(self, experiment: str, info: RunInfo) -> None:
        self._names = info.routing
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.set_experiment(experiment)
        known, self._ended = _identity(info, "mlflow"), "KILLED"
        run = self._mlflow.start_run(run_id=known, run_name=None if known else info.name)
        _remember(info, "mlflow", str(run.info.run_id))
        if known is None:  # a parameter is written once
            values = sorted(_flat(_config(Path(info.folder))))
            for first in range(0, len(values), _AT_ONCE):
                self._mlflow.log_params(dict(values[first : first + _AT_ONCE]))

    def metrics(self, metrics: Metrics) -> None:
        """A report."""
        self._log(scalars_of(metrics, self._names), metrics.step)

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """An evaluation."""
        self._log(scalars_of_scores(split, scores), step)

    def message(self, text: str) -> None:
        """Nothing: it has no place for them."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run has ended as it should."""
        self._ended = "FINISHED"

    def close(self) -> None:
        """End of this process' part."""
        self._mlflow.end_run(self._ended)

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({_UNNAMEABLE.sub("_", name): value for name, value in scalars.items()}, step=step)


def _identity(info: RunInfo, name: str) -> str | None:
    """The run's number there, if this goes on with a run that had one."""
    if not info.start_step:
        return None
    with suppress(OSError):
        return (Path(info.folder) / IDENTITY.format(name=name)).read_text(encoding="utf-8").strip() or None
    return None


def _remember(info: RunInfo, name: str, number: str) -> None:
    write_atomically(Path(info.folder) / IDENTITY.format(name=name), number + "\n")


def _config(folder: Path) -> dict[str, Any]:
    values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`model.dim` -> value, for every key; lists stay whole."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield _UNNAMEABLE.sub("_", f"{prefix}{key}"), value
