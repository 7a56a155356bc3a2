"""TensorBoard event files under tensorboard/ of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemm.observe.records import Metrics, RunInfo
from moemm.observe.tensorboard import TensorBoard
from moemm.train.callbacks.base import Callback

FOLDER = "tensorboard"


class TensorBoardCallback(Callback):
    """Writes reports and scores."""

    def __init__(self) -> None:
        self._board: TensorBoard | None = None

    def on_start(self, info: RunInfo) -> None:
        """Open the event file."""
        self._board = TensorBoard(Path(info.folder) / FOLDER, info)

    def on_metrics(self, metrics: Metrics) -> None:
        """Write a report."""
        if self._board is not None:
            self._board.metrics(metrics)

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Write scores."""
        if self._board is not None:
            self._board.scores(step, split, scores)

    def on_close(self) -> None:
        """Write out what is buffered."""
        if self._board is not None:
            self._board.close()
