"""Reuse on a planted model: one expert is everything for one task, the others are nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moemm.data import build_catalogue
from moemm.evaluate import EvaluationPlan, TaskScore, causal_reuse, evaluate_model, loss_of
from moemm.modalities import fit_modalities
from moemm.models import build_model
from moemm.models.heads import Heads
from moemm.testing.tiny import tiny_config
from moemm.train.setup import train_values

PLANTED = "modality_series"
PLAN = EvaluationPlan(split="test", prepare={})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    loaded = tiny_config(tmp_path_factory.mktemp("tiny"))
    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    specs = fit_modalities(catalogue.modalities, {}, lambda name: train_values(catalogue, name))
    torch.manual_seed(0)
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks).eval()
    plant(model)
    made = SimpleNamespace(model=model, catalogue=catalogue, specs=specs, folder=Path("run"), step=1)
    fit_head(made, "tones")
    yield made


def plant(model: Any) -> None:
    """No expert adds anything but the planted one, which adds a lot; tokens bring nothing else to the stream's end."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("w2_DF"):
                parameter.mul_(100.0 if f".{PLANTED}." in name else 0.0)


def fit_head(run: Any, task: str) -> None:
    """The task's head by least squares on the test split itself: with the planted expert it is right everywhere."""
    pooled, targets = [], []
    handle = run.model.heads.register_forward_hook(
        lambda heads, given, out: pooled.append(heads.pool(given[0], given[1], given[2]).detach())
    )
    outputs: list[np.ndarray] = []
    from moemm.data import eval_loader

    for batch in eval_loader(run.catalogue, task=task, split="test", batch_size=64):
        with torch.no_grad():
            outputs.append(run.model(batch).outputs[task].numpy())
        targets.append(batch.targets[task])
    handle.remove()
    features = torch.cat([torch.cat(pooled), torch.ones(len(torch.cat(pooled)), 1)], dim=1).double()
    wanted = torch.nn.functional.one_hot(torch.cat(targets), 3).double()
    solved = torch.linalg.lstsq(features, wanted, driver="gelsd").solution.float()
    assert isinstance(run.model.heads, Heads)
    with torch.no_grad():
        run.model.heads.linear[task].weight.copy_(solved[:-1].T)
        run.model.heads.linear[task].bias.copy_(solved[-1])


def test_only_the_planted_expert_is_missed(run: Any) -> None:
    full = evaluate_model(run.model, run.catalogue, PLAN)
    assert full["tones"].value == 1.0
    told: list[str] = []
    found = causal_reuse(run, full, tell=told.append)
    assert list(found) == [expert.id for expert in run.model.map.experts] and len(told) == len(found)
    assert found[PLANTED]["tones"] > 0.3
    assert list(found[PLANTED]) == ["tones"], "no modality of shapes may use it"
    for expert in ("shared", "routed_0", "routed_1"):
        assert found[expert] == {"shapes": 0.0, "tones": 0.0}
    assert found["modality_image"] == found["modality_record"] == {"shapes": 0.0}
    assert evaluate_model(run.model, run.catalogue, PLAN) == full, "the model is as it was"


def test_the_loss_is_that_of_a_model_that_never_had_the_expert(run: Any) -> None:
    full = evaluate_model(run.model, run.catalogue, PLAN)
    found = causal_reuse(run, full)[PLANTED]["tones"]
    kept = {name: value.clone() for name, value in run.model.state_dict().items()}
    with torch.no_grad():
        for block in run.model.trunk.blocks:
            block.ffn.experts[PLANTED].w2_DF.zero_()
    gone = evaluate_model(run.model, run.catalogue, PLAN)["tones"].value
    run.model.load_state_dict(kept)
    assert gone is not None and found == 1.0 - gone


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, model={"dim": 16, "heads": 2, "layers": 1, "moe": "dense"})
    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    specs = fit_modalities(catalogue.modalities, {}, lambda name: train_values(catalogue, name))
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks)
    dense = SimpleNamespace(model=model, catalogue=catalogue, specs=specs, folder=tmp_path, step=1)
    assert causal_reuse(dense, {}) == {}


@pytest.mark.parametrize(
    ("metric", "full", "now", "loss"),
    [("accuracy", 0.75, 0.5, 0.25), ("rmse", 2.0, 3.0, 1.0), ("auc", None, 0.5, None), ("auc", 0.5, None, None)],
)
def test_losses_are_positive_where_it_got_worse(
    metric: str, full: float | None, now: float | None, loss: float | None
) -> None:
    assert loss_of(TaskScore(metric=metric, value=full, n=1), TaskScore(metric=metric, value=now, n=1)) == loss


def test_a_plan_may_name_its_tasks(run: Any) -> None:
    plan = EvaluationPlan(split="test", prepare={}, tasks=("tones",))
    assert list(evaluate_model(run.model, run.catalogue, plan)) == ["tones"]
