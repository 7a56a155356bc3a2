"""metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemm.observe.jsonl import JsonLines
from moemm.observe.records import Metrics, RunInfo
from moemm.train.callbacks.base import Callback

FILE_NAME = "metrics.jsonl"


class JsonLinesCallback(Callback):
    """One line a report ("event": "train"), an evaluation ("scores"), a message ("message")."""

    def __init__(self) -> None:
        self._lines: JsonLines | None = None

    def on_start(self, info: RunInfo) -> None:
        """Open the file, without the lines that a resume goes back behind."""
        self._lines = JsonLines(Path(info.folder) / FILE_NAME, after=info.start_step)

    def on_metrics(self, metrics: Metrics) -> None:
        """Write a report."""
        self._write(metrics.to_dict())

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Write scores."""
        self._write({"event": "scores", "step": step, "split": split, "scores": scores})

    def on_message(self, text: str) -> None:
        """Write a message."""
        self._write({"event": "message", "text": text})

    def on_close(self) -> None:
        """Close the file."""
        if self._lines is not None:
            self._lines.close()

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._lines is not None:
            self._lines.write(values)
