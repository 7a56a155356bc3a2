"""Collapse of routing, noticed while it happens: a modality that keeps to one expert, an expert that nobody chooses.

L layers with a router, M rows of the expert map, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moemm.observe.routing import RouterReport, RoutingNames

EVENNESS = 0.25
"""Below this a modality has collapsed; of four experts at one choice a token, 0.93 of the load on one of them."""
PATIENCE = 5
"""Findings in a row before it is told: routing wanders in the first steps."""
CHOICES = 64
"""Choices that each expert would have had under an even load before anything is judged."""
LINES = 3
"""Findings of a kind that are told one by one; more at once are counted."""


class _Streaks:
    """Findings in a row, of many places at once. `update` gives the places where patience has just run out."""

    def __init__(self, *shape: int) -> None:
        self._count = np.zeros(shape, int)

    def update(self, judged: np.ndarray, bad: np.ndarray) -> np.ndarray:
        """Bool: told now. Where not judged nothing changes; a good finding ends a streak: it may be told again."""
        self._count = np.where(judged, np.where(bad, self._count + 1, 0), self._count)
        return judged & bad & (self._count == PATIENCE)


class RoutingAlarm:
    """Reads every report; windows too small to judge by are added up until they are not.

    names: None for a model without a router, for which there is nothing to tell. advice: what to change in the
    configuration. collapse: False where modalities are meant to keep to few experts; dead experts are told anyway.
    """

    def __init__(self, names: RoutingNames | None, *, advice: str, collapse: bool = True) -> None:
        self._names, self._advice, self._collapse = names, advice, collapse
        if names is None:
            return
        num_layers, num_rows, num_experts = names.allowed_LME.shape
        self._number_LM = names.allowed_LME.sum(-1)
        self._collapsed, self._dead = _Streaks(num_layers, num_rows), _Streaks(num_layers, num_experts)
        self._load_LME, self._tokens_LM = np.zeros(names.allowed_LME.shape), np.zeros((num_layers, num_rows))
        self._chosen_LE, self._expected_LE = (np.zeros((num_layers, num_experts)) for _ in range(2))

    def check(self, routing: RouterReport | None) -> list[str]:
        """Lines to show after this report; mostly none. A finding is told once, and again only if it went away."""
        if self._names is None or routing is None:
            return []
        return [*_shortened(list(self._check_rows(routing))), *_shortened(list(self._check_experts(routing)))]

    def _check_rows(self, routing: RouterReport) -> Iterator[str]:
        """Modalities that keep to too few of their experts."""
        assert self._names is not None
        self._load_LME += routing.load_LME
        self._tokens_LM += routing.tokens_M
        judged_LM = (self._number_LM > 1) & (self._load_LME.sum(-1) >= CHOICES * self._number_LM)
        even_LM = np.stack([self._evenness(layer) for layer in range(len(self._names.layers))])
        told_LM = self._collapsed.update(judged_LM, np.nan_to_num(even_LM, nan=1.0) < EVENNESS)
        for layer, row in np.argwhere(told_LM) if self._collapse else ():
            load_E = self._load_LME[layer, row]
            first = int(load_E.argmax())
            yield (
                f"warning: layer {self._names.layers[layer]}: {self._names.rows[row]} keeps to expert "
                f"{self._names.experts[first]} ({load_E[first] / load_E.sum():.0%} of its choices, "
                f"{self._number_LM[layer, row]} experts allowed, evenness {even_LM[layer, row]:.2f} below {EVENNESS}, "
                f"{PATIENCE} times in a row); {self._advice}"
            )
        self._load_LME[judged_LM] = 0.0
        self._tokens_LM[judged_LM] = 0.0

    def _evenness(self, layer: int) -> np.ndarray:
        """(M,) evenness of what has been added up for a layer."""
        assert self._names is not None
        load_1ME = self._load_LME[layer][None]
        nothing_1M = np.zeros(load_1ME.shape[:2])
        added = RouterReport(
            load_LME=load_1ME, prob_LME=load_1ME, dropped_LM=nothing_1M, tokens_M=self._tokens_LM[layer]
        )  # fmt: skip
        even_M: np.ndarray = added.evenness_LM(self._names.allowed_LME[layer][None])[0]
        return even_M

    def _check_experts(self, routing: RouterReport) -> Iterator[str]:
        """Experts that no token chose, of those that tokens might have chosen."""
        assert self._names is not None
        fair_LM = routing.load_LME.sum(-1) / np.maximum(self._number_LM, 1)
        self._expected_LE += (fair_LM[..., None] * self._names.allowed_LME).sum(1)
        self._chosen_LE += routing.load_LME.sum(1)
        judged_LE = self._expected_LE >= CHOICES
        for layer, expert in np.argwhere(self._dead.update(judged_LE, self._chosen_LE == 0)):
            allowed_M = self._names.allowed_LME[layer, :, expert] & (routing.tokens_M > 0)
            yield (
                f"warning: layer {self._names.layers[layer]}: no token chose expert {self._names.experts[expert]} "
                f"{PATIENCE} times in a row (an even load would be {self._expected_LE[layer, expert]:.0f}), though "
                f"{_some([self._names.rows[row] for row in np.flatnonzero(allowed_M)])} may; {self._advice}, or give "
                "the group of this expert a smaller count"
            )
        self._chosen_LE[judged_LE] = 0.0
        self._expected_LE[judged_LE] = 0.0


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - LINES
    more = [f"warning: {rest} more findings like this (TensorBoard and `moemm report` show all)"] if rest > 0 else []
    return [*lines[:LINES], *more]


def _some(names: list[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
