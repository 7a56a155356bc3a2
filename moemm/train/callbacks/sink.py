"""Others who want to know: Prometheus, Weights & Biases, MLflow. What goes wrong with them stops no training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moemm.config.schema import ObserveConfig
from moemm.observe.prometheus import PrometheusFile
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.trackers import PACKAGES, MlflowTracker, WandbTracker, check_installed
from moemm.train.callbacks.base import Callback

if TYPE_CHECKING:
    from moemm.train.trainer import Trainer


class Sink(Protocol):
    """Who is told. Each call may raise; then it is told no more."""

    def metrics(self, metrics: Metrics) -> None:
        """A report."""

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """An evaluation."""

    def message(self, text: str) -> None:
        """Something a reader should know."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is done."""

    def close(self) -> None:
        """Always last."""


class SinkCallback(Callback):
    """Gives everything to a sink, made at the start. One that fails is left out from there on, with a warning."""

    def __init__(self, name: str, make: Callable[[RunInfo], Sink]) -> None:
        self._name, self._make = name, make
        self._sink: Sink | None = None
        self._warning = ""

    def on_start(self, info: RunInfo) -> None:
        """Make it."""

        def make() -> None:
            self._sink = self._make(info)

        self._guarded(make)

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        """Tell of what went wrong."""
        warning, self._warning = self._warning, ""
        if warning:
            trainer.tell(warning)

    def on_metrics(self, metrics: Metrics) -> None:
        """A report."""
        if (sink := self._sink) is not None:
            self._guarded(lambda: sink.metrics(metrics))

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """An evaluation."""
        if (sink := self._sink) is not None:
            self._guarded(lambda: sink.scores(step, split, scores))

    def on_message(self, text: str) -> None:
        """A message."""
        if (sink := self._sink) is not None:
            self._guarded(lambda: sink.message(text))

    def on_finish(self, summary: Mapping[str, Any]) -> None:
        """The summary."""
        if (sink := self._sink) is not None:
            self._guarded(lambda: sink.finish(summary))

    def on_close(self) -> None:
        """The end."""
        if (sink := self._sink) is not None:
            self._guarded(sink.close)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a library of others, a network or a disk can do
            self._sink = None
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._warning = f"warning: {self._name} is told no more, training goes on: {text}"


def check_sinks(config: ObserveConfig) -> None:
    """Raises ConfigError where a package is wanted that is not installed."""
    for name in PACKAGES:
        if getattr(config, name) is not None:
            check_installed(name)


def sinks(config: ObserveConfig) -> list[Callback]:
    """A callback for each that the configuration names."""
    found: list[Callback] = []
    if (path := config.prometheus) is not None:
        found.append(SinkCallback("observe.prometheus", lambda info: PrometheusFile(Path(path), info)))
    if (project := config.wandb) is not None:
        found.append(SinkCallback("observe.wandb", lambda info: WandbTracker(project, info)))
    if (experiment := config.mlflow) is not None:
        found.append(SinkCallback("observe.mlflow", lambda info: MlflowTracker(experiment, info)))
    return found
