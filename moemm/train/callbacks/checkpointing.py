"""Saves every train.checkpoint.every steps, in the background if wanted, and when training stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from moemm.errors import CheckpointError
from moemm.train.callbacks.base import Callback

if TYPE_CHECKING:
    from moemm.train.trainer import Trainer

MAX_FAILURES = 3


class CheckpointingCallback(Callback):
    """A save that fails (full disk) is reported and training goes on; three failures in a row, or a failure of the last
    save, end it. All ranks agree, because a failed save fails on all of them.
    """  # fmt: skip

    every_rank = True

    def __init__(self, *, every: int) -> None:
        self._every, self._failures = every, 0

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        """Save when it is time, and go on with a save that is under way."""
        due = stopping or bool(self._every and trainer.step % self._every == 0)
        self._attempt(trainer, lambda: trainer.continue_save(wait=due), last=False)
        if due:
            background = trainer.config.train.checkpoint.background and not stopping
            self._attempt(trainer, lambda: trainer.save(background=background), last=stopping)

    def _attempt(self, trainer: Trainer, action: Callable[[], bool], *, last: bool) -> None:
        try:
            if action():
                self._failures = 0
        except CheckpointError as error:
            self._failures += 1
            if last or self._failures >= MAX_FAILURES:
                raise CheckpointError(
                    f"{error}\n{self._failures} saves in a row failed; free space on the disk, then add --resume."
                ) from error
            trainer.tell(f"warning: {error} Training goes on ({self._failures} of {MAX_FAILURES} failures in a row).")
