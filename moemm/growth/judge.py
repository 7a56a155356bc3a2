"""Scores on the val split as one number, to choose between models. The test split is never read here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moemm.data.catalogue import TaskInfo
from moemm.errors import DataError
from moemm.evaluate import EvaluationPlan, evaluate_model
from moemm.evaluate.metrics import direction
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.train import Run

SPLIT = "val"


@dataclass(frozen=True, slots=True)
class Score:
    """tasks: value of each task's metric, None where it has none. mean: over the tasks, more is better."""

    tasks: dict[str, float | None]
    mean: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; a mean that is no number is None."""
        return {"tasks": self.tasks, "mean": self.mean if math.isfinite(self.mean) else None}


class Judge:
    """Scores weights on val.

    model: of which the weights are; it is left with those that were scored last. reference: what errors are measured
    in, task by task; the values of the first weights when not given.
    """

    def __init__(self, model: Model, run: Run, *, reference: Mapping[str, float] | None = None) -> None:
        self.model, self._catalogue = model, run.catalogue
        self._plan = EvaluationPlan(split=SPLIT, prepare=prepare_functions(run.specs))
        self.reference = dict(reference or {})

    def __call__(self, weights: Mapping[str, torch.Tensor]) -> Score:
        """The scores of these weights. Raises DataError where no task has a score on val."""
        self.model.load_state_dict(dict(weights))
        found = evaluate_model(self.model.eval(), self._catalogue, self._plan)
        values = {name: score.value for name, score in found.items()}
        if not self.reference:
            self.reference = {name: value for name, value in values.items() if value is not None}
        if not self.reference:
            raise DataError(
                "no task has a score on split val, so there is nothing to choose by\n"
                "  allowed: runs with samples of val, and weights that give finite outputs\n"
                "  to do: mark samples of the data files for val, and check the first run with `moemm evaluate`"
            )
        return Score(values, mean_score(values, self.reference, self._catalogue.tasks))


def mean_score(
    values: Mapping[str, float | None], reference: Mapping[str, float], tasks: tuple[TaskInfo, ...]
) -> float:
    """Mean over the tasks of `reference` of the value, or 1 - value / reference where less is better; minus infinity
    where one has no value.
    """  # fmt: skip
    total = 0.0
    for task in tasks:
        if task.name not in reference:
            continue
        value = values[task.name]
        if value is None:
            return -math.inf
        least = max(reference[task.name], 1e-12)
        total += value if direction(task.metric) > 0 else 1.0 - value / least
    return total / len(reference)
