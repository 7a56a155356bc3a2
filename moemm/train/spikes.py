"""Steps whose loss stands out above those before: `train.health.spike`."""

from __future__ import annotations

import statistics
from collections import deque

WINDOW, LEAST = 128, 32
_DEVIATION = 1.4826
"""From the median of the distances to the standard deviation of a normal distribution."""
_FLAT = 1e-6
"""Share of the median that counts as a deviation where losses hardly differ."""


class Spikes:
    """Compares the loss of a step with the last WINDOW that were applied; with fewer than LEAST it says nothing.

    Median and median distance, because a mean and a deviation would be moved by what they are to find. What was left
    out never enters the window, so one spike hides no other. limit: in deviations. The window is not in checkpoints:
    after a resume it fills anew.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def excess(self, loss: float) -> float | None:
        """By how many deviations a loss stands out, if that is over the limit."""
        if len(self._losses) < LEAST:
            return None
        median = statistics.median(self._losses)
        distance = statistics.median(abs(one - median) for one in self._losses)
        found = (loss - median) / max(_DEVIATION * distance, _FLAT * abs(median), 1e-12)
        return found if found > self._limit else None

    def add(self, loss: float) -> None:
        """Put the loss of a step that was applied into the window."""
        self._losses.append(loss)
