"""Saves every train.checkpoint.every steps and when training stops."""

from __future__ import annotations

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
        """Save when it is time."""
        if not stopping and not (self._every and trainer.step % self._every == 0):
            return
        try:
            trainer.save()
            self._failures = 0
        except CheckpointError as error:
            self._failures += 1
            if stopping or self._failures >= MAX_FAILURES:
                raise CheckpointError(
                    f"{error}\n{self._failures} saves in a row failed; free space on the disk, then add --resume."
                ) from error
            trainer.tell(f"warning: {error} Training goes on ({self._failures} of {MAX_FAILURES} failures in a row).")
