"""What one modality's network is worth to another, in bits. S sources, T targets: the same names in the same order."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

Measure = Literal["pvi", "zero-shot"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bits a sample: row the source, column the target.

    measure: `pvi`, bits gained over knowing nothing, more is better; `zero-shot`, bits lost against the target's own
    experts, less is better. `loss_ST` and `distance` mean the same for both.
    """

    measure: Measure
    names: tuple[str, ...]
    bits_ST: np.ndarray

    @property
    def loss_ST(self) -> np.ndarray:
        """(S, T) bits that the target loses where it takes the source's network in place of its own; diagonal 0."""
        if self.measure == "zero-shot":
            return self.bits_ST
        return self.bits_ST.diagonal()[None, :] - self.bits_ST

    def distance(self) -> np.ndarray:
        """(S, S) symmetric: the mean of the losses of both directions, at least 0; diagonal 0."""
        both = np.maximum((self.loss_ST + self.loss_ST.T) / 2, 0.0)
        np.fill_diagonal(both, 0.0)
        return both

    def write_csv(self, path: Path) -> None:
        """A line a source, a column a target; bits with 6 digits."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([f"{self.measure}: source \\ target", *self.names])
            for name, row in zip(self.names, self.bits_ST, strict=True):
                writer.writerow([name, *(f"{value:.6f}" for value in row)])
