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
        self._info: RunInfo | None = None
        self._opened: TensorBoard | None = None

    def on_start(self, info: RunInfo) -> None:
        """Take down where to write."""
        self._info = info

    @property
    def _board(self) -> TensorBoard | None:
        """The event file, opened when there is something to write: importing its library delays the first step."""
        if self._opened is None and self._info is not None:
            self._opened = TensorBoard(Path(self._info.folder) / FOLDER, self._info)
        return self._opened

    def on_metrics(self, metrics: Metrics) -> None:
        """Write a report."""
        if (board := self._board) is not None:
            board.metrics(metrics)

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Write scores."""
        if (board := self._board) is not None:
            board.scores(step, split, scores)

    def on_close(self) -> None:
        """Write out what is buffered."""
        if self._opened is not None:
            self._opened.close()
