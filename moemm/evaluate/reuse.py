"""Causal reuse: what each task loses when an expert is switched off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from moemm.evaluate.metrics import direction
from moemm.evaluate.run import TrainedRun
from moemm.evaluate.scoring import EvaluationPlan, TaskScore, evaluate_model
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.moe import without_expert

Tell = Callable[[str], None]


def plan_of(run: TrainedRun, split: str) -> EvaluationPlan:
    """A plan for all of a split."""
    device = next(run.model.parameters()).device
    return EvaluationPlan(split=split, prepare=prepare_functions(run.specs), device=device)


def loss_of(full: TaskScore, now: TaskScore) -> float | None:
    """By how much `now` is worse than `full`, in the metric's unit; None where one of them has no value."""
    if full.value is None or now.value is None:
        return None
    return (now.value - full.value) if direction(full.metric) < 0 else (full.value - now.value)


def causal_reuse(
    run: TrainedRun, full: Mapping[str, TaskScore], *, split: str = "test", tell: Tell = lambda text: None
) -> dict[str, dict[str, float | None]]:
    """expert -> task -> what the task loses without that expert in any layer; only tasks whose modalities may use it.

    full: scores of the whole model on the same split. tell: is given a line before each expert.
    One evaluation an expert.
    """
    model, plan, found = cast(Model, run.model), plan_of(run, split), {}
    experts = model.map.experts if model.config.moe == "sparse" else ()
    for number, expert in enumerate(experts):
        tell(f"without expert {expert.id} ({number + 1} of {len(experts)})")
        tasks = [t.name for t in run.catalogue.tasks if any(expert.serves(name, t.name) for name in t.modalities)]
        with without_expert(model, expert.id):
            scores = evaluate_model(model, run.catalogue, replace(plan, tasks=tasks))
        found[expert.id] = {task: loss_of(full[task], score) for task, score in scores.items()}
    return found
