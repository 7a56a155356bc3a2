"""What a row of the fault table brings, and which of its cases are tried."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass(slots=True)
class Outcome:
    """count: cases that were tried. wrong: of each that did not go as it must, what happened."""

    case: str
    count: int
    wrong: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the cases, those that went as they must."""
        return 1.0 - min(len(self.wrong), self.count) / self.count


def spread(cases: Sequence[T], count: int) -> list[T]:
    """`count` of the cases, drawn evenly and in order, always the same; all of them for a larger count."""
    if count >= len(cases):
        return list(cases)
    chosen = sorted(random.Random(0).sample(range(len(cases)), count))
    return [cases[number] for number in chosen]
