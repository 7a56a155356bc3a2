"""Causal reuse: what each task loses when an expert is switched off; and its scores when modalities are taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import cast

from moemm.evaluate.metrics import LOWER_IS_BETTER
from moemm.evaluate.run import TrainedRun
from moemm.evaluate.scoring import EvaluationPlan, TaskScore, evaluate_model
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.moe import without_expert

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetScore:
    """A task's score with the modalities `present` alone; None where no sample is left."""

    task: str
    metric: str
    present: tuple[str, ...]
    value: float | None


def plan_of(run: TrainedRun, split: str) -> EvaluationPlan:
    """A plan for all of a split."""
    device = next(run.model.parameters()).device
    return EvaluationPlan(split=split, prepare=prepare_functions(run.specs), device=device)


def loss_of(full: TaskScore, now: TaskScore) -> float | None:
    """By how much `now` is worse than `full`, in the metric's unit; None where one of them has no value."""
    if full.value is None or now.value is None:
        return None
    return (now.value - full.value) if full.metric in LOWER_IS_BETTER else (full.value - now.value)


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


def subset_scores(
    run: TrainedRun, full: Mapping[str, TaskScore], *, split: str = "test", tell: Tell = lambda text: None
) -> list[SubsetScore]:
    """Scores of each task with all of its modalities (`full`), without each one of them, and with each one alone."""
    plan, found = plan_of(run, split), []
    for task in run.catalogue.tasks:
        names = task.modalities
        if len(names) > 1:
            tell(f"{task.name} without each of its {len(names)} modalities, and with each alone")
        lacking_one = [tuple(other for other in names if other != name) for name in names]
        for present in dict.fromkeys([names, *lacking_one, *((name,) for name in names)]):
            if present:
                drop = tuple(name for name in names if name not in present)
                one = replace(plan, drop=drop, tasks=(task.name,))
                score = evaluate_model(run.model, run.catalogue, one)[task.name] if drop else full[task.name]
                found.append(SubsetScore(task=task.name, metric=task.metric, present=present, value=score.value))
    return found
