"""What the routers of a window did, and what one reads from it. Plain numbers on the CPU.

L layers with a router, M rows of the expert map (modalities, or modalities in tasks), E routed experts of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingNames:
    """What the axes stand for. layers: numbers of the blocks; allowed_LME: bool, who may use what where."""

    layers: tuple[int, ...]
    rows: tuple[str, ...]
    experts: tuple[str, ...]
    allowed_LME: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        allowed = self.allowed_LME.astype(int).tolist()
        return {"layers": list(self.layers), "rows": list(self.rows), "experts": list(self.experts), "allowed": allowed}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RoutingNames:
        """The inverse of to_dict. Raises KeyError, TypeError or ValueError."""
        layers, rows, experts = (tuple(values[key]) for key in ("layers", "rows", "experts"))
        allowed_LME = np.asarray(values["allowed"], bool).reshape(len(layers), len(rows), len(experts))
        return cls(layers=layers, rows=rows, experts=experts, allowed_LME=allowed_LME)


def row_name(modality: str, task: str | None) -> str:
    """What a row of the expert map is called: `image`, `image in digits`."""
    return modality if task is None else f"{modality} in {task}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterReport:
    """Sums over the tokens of a window, of all ranks; float64. They add up.

    load_LME: how many times an expert was chosen. prob_LME: router probability given to it. dropped_LM: slots that
    found no room. tokens_M: tokens.
    """

    load_LME: np.ndarray
    prob_LME: np.ndarray
    dropped_LM: np.ndarray
    tokens_M: np.ndarray

    def __add__(self, other: RouterReport) -> RouterReport:
        return RouterReport(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    @property
    def share_LME(self) -> np.ndarray:
        """Share of a row's choices that fell on an expert; 0 where there were none."""
        return self.load_LME / np.maximum(self.load_LME.sum(-1, keepdims=True), 1.0)

    @property
    def layer_share_LE(self) -> np.ndarray:
        """The same over all rows together."""
        load_LE = self.load_LME.sum(1)
        return load_LE / np.maximum(load_LE.sum(-1, keepdims=True), 1.0)

    @property
    def mean_prob_LME(self) -> np.ndarray:
        """Mean probability of a row's tokens; 0 where there were none."""
        return self.prob_LME / np.maximum(self.tokens_M, 1.0)[None, :, None]

    @property
    def dropped_share_LM(self) -> np.ndarray:
        """Share of the slots that found no room."""
        return self.dropped_LM / np.maximum(self.dropped_LM + self.load_LME.sum(-1), 1.0)

    def evenness_LM(self, allowed_LME: np.ndarray) -> np.ndarray:
        """Entropy of the load from the least that is possible (0) to an even load (1); NaN where nothing can differ.

        With n allowed experts and k choices a token it lies between log k and log n: no expert can be chosen twice by
        one token, so none has more than 1/k of the load. NaN: k = n, or no token.
        """
        share_LME, number_LM = self.share_LME, allowed_LME.sum(-1)
        entropy_LM = -(share_LME * np.log(np.where(share_LME > 0, share_LME, 1.0))).sum(-1)
        chosen_LM = self.load_LME.sum(-1)
        least_LM = np.log(np.maximum(chosen_LM / np.maximum(self.tokens_M, 1.0), 1.0))
        span_LM = np.log(np.maximum(number_LM, 1)) - least_LM
        known_LM = (chosen_LM > 0) & (span_LM > 1e-6)
        even_LM = (entropy_LM - least_LM) / np.where(known_LM, span_LM, 1.0)
        return np.where(known_LM, even_LM.clip(0.0, 1.0) + 0.0, np.nan)  # + 0.0: never -0.00

    def dead_LE(self, allowed_LME: np.ndarray) -> np.ndarray:
        """Bool: experts that rows with tokens may use and that no token chose."""
        usable_LE = (allowed_LME & (self.tokens_M > 0)[None, :, None]).any(1)
        return usable_LE & (self.load_LME.sum(1) == 0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; probabilities with one digit behind the point, drops only where there are any."""
        values = {
            "tokens": self.tokens_M.astype(int).tolist(),
            "load": self.load_LME.astype(int).tolist(),
            "prob": self.prob_LME.round(1).tolist(),
        }
        return values | ({"dropped": self.dropped_LM.astype(int).tolist()} if self.dropped_LM.any() else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouterReport:
        """The inverse of to_dict. Raises KeyError, TypeError or ValueError."""
        load_LME, tokens_M = np.asarray(values["load"], float), np.asarray(values["tokens"], float)
        prob_LME = np.asarray(values["prob"], float).reshape(load_LME.shape)
        dropped_LM = np.asarray(values.get("dropped", np.zeros(load_LME.shape[:2])), float)
        return cls(load_LME=load_LME, prob_LME=prob_LME, dropped_LM=dropped_LM, tokens_M=tokens_M)
