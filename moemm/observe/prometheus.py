"""A text file in Prometheus' exposition format, for the textfile collector of its node_exporter.

https://github.com/prometheus/node_exporter#textfile-collector asks for a name that ends in .prom and for a file that
appears under it complete; https://prometheus.io/docs/instrumenting/exposition_formats says what a line is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moemm.observe.heartbeat import write_atomically
from moemm.observe.records import Metrics, RunInfo

_ESCAPED = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = tuple[tuple[str, str], ...]
HELP = {
    "running": "1 while the run is training, 0 once it has ended.",
    "last_report_timestamp_seconds": "When this file was written, in seconds since 1970.",
    "step": "Optimizer steps done.",
    "steps_total_planned": "Optimizer steps that the run will have at its end.",
    "seconds_left": "Expected seconds until the last step.",
    "loss": "The whole objective, mean since the last report.",
    "task_loss": "Loss of a task, mean over its samples since the last report.",
    "task_accuracy": "Training accuracy of a task since the last report.",
    "objective": "Loss of an objective without labels since the last report.",
    "learning_rate": "Learning rate.",
    "gradient_norm": "Norm of the last gradient before clipping.",
    "tokens_per_second": "Tokens a second over all ranks.",
    "score": "Score of a task on a split.",
    "warnings_total": "Warnings told since this process began.",
}
"""Name of each metric, less the prefix moemm_, and what it is."""


class PrometheusFile:
    """Rewrites `path` with every report, evaluation and warning. Raises OSError where it cannot."""

    def __init__(self, path: Path, info: RunInfo, clock: Callable[[], float] = time.time) -> None:
        self._path, self._run, self._clock = path, info.name, clock
        self._values: dict[tuple[str, Labels], float] = {}
        self._put("running", 1)
        self._put("step", info.start_step)
        self._put("steps_total_planned", info.total_steps)
        self._put("warnings_total", 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def metrics(self, metrics: Metrics) -> None:
        """A report."""
        single = {
            "step": metrics.step,
            "seconds_left": metrics.seconds_left,
            "loss": metrics.loss,
            "learning_rate": metrics.lr,
            "gradient_norm": math.nan if metrics.grad_norm is None else metrics.grad_norm,
            "tokens_per_second": metrics.tokens_per_second,
        }
        for name, value in single.items():
            self._put(name, value)
        for task, value in metrics.losses.items():
            self._put("task_loss", value, task=task)
        for task, value in metrics.accuracy.items():
            self._put("task_accuracy", value, task=task)
        for objective, value in metrics.objectives.items():
            self._put("objective", value, objective=objective)
        self._write()

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """An evaluation."""
        for task, score in scores.items():
            if score["value"] is not None:
                self._put("score", score["value"], task=task, split=split, metric=str(score["metric"]))
        self._write()

    def message(self, text: str) -> None:
        """Counts warnings."""
        if "warning: " in text:
            self._values["warnings_total", self._labels()] += 1
            self._write()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing that `close` does not say."""

    def close(self) -> None:
        """The run has ended; the file stays, and says so."""
        self._put("running", 0)
        self._write()

    def _labels(self, **labels: str) -> Labels:
        return tuple({"run": self._run, **labels}.items())

    def _put(self, name: str, value: float, **labels: str) -> None:
        self._values[name, self._labels(**labels)] = float(value)

    def _write(self) -> None:
        self._put("last_report_timestamp_seconds", self._clock())
        write_atomically(self._path, "\n".join(self._lines()) + "\n")

    def _lines(self) -> Iterator[str]:
        for name, text in HELP.items():
            found = [(labels, value) for (one, labels), value in self._values.items() if one == name]
            if found:
                yield f"# HELP moemm_{name} {text}"
                yield f"# TYPE moemm_{name} {'counter' if name == 'warnings_total' else 'gauge'}"
            for labels, value in found:
                pairs = ",".join(f'{key}="{text.translate(_ESCAPED)}"' for key, text in labels)
                yield f"moemm_{name}{{{pairs}}} {_number(value)}"


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
