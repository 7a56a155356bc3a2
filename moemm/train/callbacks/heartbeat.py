"""heartbeat.json: see observe/heartbeat.py."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from signal import Signals
from typing import TYPE_CHECKING, Any

from moemm.observe.heartbeat import Heartbeat
from moemm.observe.records import RunInfo
from moemm.train.callbacks.base import Callback

if TYPE_CHECKING:
    from moemm.train.trainer import Trainer


class HeartbeatCallback(Callback):
    """Says where training is, and at its end how it ended."""

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat
        self._ended, self._reason = "failed", ""

    def on_start(self, info: RunInfo) -> None:
        """The first step is near."""
        self._heartbeat.beat("train", step=info.start_step, total_steps=info.total_steps)

    def on_phase(self, phase: str, step: int) -> None:
        """An evaluation or a save."""
        self._heartbeat.beat(phase, step=step)

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        """A step is done."""
        self._heartbeat.beat("train", step=trainer.step)
        if trainer.stopped_by:
            self._ended, self._reason = "stopped", f"by {Signals(trainer.stopped_by).name}"

    def on_finish(self, summary: Mapping[str, Any]) -> None:
        """All is done."""
        self._ended, self._reason = "finished", f"{summary['steps']} steps"

    def on_close(self) -> None:
        """The last sign."""
        error = sys.exc_info()[1]
        if error is not None:
            first = (str(error) or "no message").split("\n", 1)[0]
            self._ended, self._reason = "failed", f"{type(error).__name__}: {first}"
        self._heartbeat.beat(self._ended, reason=self._reason)
