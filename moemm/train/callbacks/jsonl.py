"""metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemm.observe.jsonl import JsonLines
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.routing import RouterReport
from moemm.train.callbacks.base import Callback

FILE_NAME = "metrics.jsonl"
NUMBERS = 512


class JsonLinesCallback(Callback):
    """One line a report ("event": "train"), an evaluation ("scores"), a message ("message"), and what routers did
    ("routing"; what stands on its axes in "routing_names"), a step that was not done whole ("left_out").

    Large expert maps are written less often, their counts added up: the file grows by some NUMBERS a report at most.
    """  # fmt: skip

    def __init__(self) -> None:
        self._lines: JsonLines | None = None
        self._routing: RouterReport | None = None
        self._reports = 0

    def on_start(self, info: RunInfo) -> None:
        """Open the file, without the lines that a resume goes back behind."""
        self._lines = JsonLines(Path(info.folder) / FILE_NAME, after=info.start_step)
        if info.routing is not None:
            self._write({"event": "routing_names", **info.routing.to_dict()})

    def on_metrics(self, metrics: Metrics) -> None:
        """Write a report."""
        self._write(metrics.to_dict())
        if metrics.routing is None:
            return
        self._routing = metrics.routing if self._routing is None else self._routing + metrics.routing
        self._reports += 1
        if self._reports * NUMBERS >= metrics.routing.load_LME.size or metrics.step == metrics.total_steps:
            self._write({"event": "routing", "step": metrics.step, **self._routing.to_dict()})
            self._routing, self._reports = None, 0

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Write scores."""
        self._write({"event": "scores", "step": step, "split": split, "scores": scores})

    def on_message(self, text: str) -> None:
        """Write a message."""
        self._write({"event": "message", "text": text})

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Write an event."""
        self._write(event)

    def on_close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(values)
