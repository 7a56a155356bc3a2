"""Progress on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moemm.observe.console import ConsoleWriter
from moemm.observe.records import Metrics, RunInfo
from moemm.train.callbacks.base import Callback

if TYPE_CHECKING:
    from moemm.train.trainer import Trainer


class ConsoleCallback(Callback):
    """Shows what observe/console.py makes of the hooks."""

    def __init__(self) -> None:
        self._writer: ConsoleWriter | None = None

    def on_start(self, info: RunInfo) -> None:
        """Open the panel."""
        self._writer = ConsoleWriter(info)
        self._writer.start()

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        """Move the bar."""
        if self._writer is not None:
            self._writer.advance(trainer.step)

    def on_metrics(self, metrics: Metrics) -> None:
        """Show a report."""
        if self._writer is not None:
            self._writer.metrics(metrics)

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Show scores."""
        if self._writer is not None:
            self._writer.scores(step, split, scores)

    def on_message(self, text: str) -> None:
        """Print a line."""
        if self._writer is not None:
            self._writer.message(text)

    def on_finish(self, summary: Mapping[str, Any]) -> None:
        """Print the table of tasks."""
        if self._writer is not None:
            self._writer.results(summary)

    def on_close(self) -> None:
        """Take the panel away."""
        if self._writer is not None:
            self._writer.close()
