"""Scores over splits: every sample once, on any number of ranks, with modalities taken away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moemm.data import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.errors import ConfigError
from moemm.evaluate import EvaluationPlan, evaluate_model, evaluate_run, render
from moemm.modalities import ModalitySpec, fit_modalities
from moemm.models import Model, build_model
from moemm.testing.tiny import tiny_config
from moemm.train.setup import train_values

Made = tuple[Model, Catalogue, dict[str, ModalitySpec]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    loaded = tiny_config(tmp_path_factory.mktemp("tiny"))
    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    specs = fit_modalities(catalogue.modalities, {}, lambda name: train_values(catalogue, name))
    torch.manual_seed(0)
    yield build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks), catalogue, specs


def plan(**options: object) -> EvaluationPlan:
    return EvaluationPlan(**{"split": "test", "prepare": {}, "batch_size": 5, **options})


def test_every_sample_is_scored_once_whatever_the_batch_size(made: Made) -> None:
    model, catalogue, _ = made
    whole = evaluate_model(model, catalogue, plan(batch_size=1000))
    parts = evaluate_model(model, catalogue, plan(batch_size=5))
    assert whole == parts
    assert {name: score.n for name, score in whole.items()} == {t.name: t.sizes["test"] for t in catalogue.tasks}


def test_ranks_share_the_work_and_all_get_the_score_of_all(made: Made) -> None:
    model, catalogue, _ = made
    alone = evaluate_model(model, catalogue, plan())
    sent: list[list[object]] = [[], [], []]

    def record(rank: int):
        return lambda value: sent[rank].append(value) or [value]

    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for rank in range(3):
        calls.clear()
        evaluate_model(model, catalogue, plan(rank=rank, world_size=3, gather=record(rank)))
        counts.append(len(calls))
    hook.remove()
    assert len(set(counts)) == 1, "every rank calls the model equally often"
    queue = [list(parts) for parts in zip(*sent, strict=True)]
    together = evaluate_model(model, catalogue, plan(world_size=3, gather=lambda _: queue.pop(0)))
    assert together == alone


def test_taking_a_modality_away_changes_its_task_and_no_other(made: Made) -> None:
    model, catalogue, specs = made
    run = SimpleNamespace(model=model, catalogue=catalogue, specs=specs, folder=Path("runs/x"), step=7)
    torch.nn.init.normal_(model.heads.linear["shapes"].weight)
    result = evaluate_run(run, missing=["image"])
    assert result["missing"] == ["image"] and result["step"] == 7
    assert result["tasks"]["tones"]["value"] == result["tasks"]["tones"]["complete"]
    assert result["tasks"]["shapes"]["n"] < catalogue.tasks[0].sizes["test"] or (
        result["tasks"]["shapes"]["value"] != result["tasks"]["shapes"]["complete"]
    )


def test_a_task_with_nothing_left_has_no_score(made: Made) -> None:
    model, catalogue, specs = made
    run = SimpleNamespace(model=model, catalogue=catalogue, specs=specs, folder=Path("runs/x"), step=7)
    result = evaluate_run(run, missing=["series"])
    assert result["tasks"]["tones"]["value"] is None and result["tasks"]["tones"]["n"] == 0
    from rich.console import Console

    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(result))
    assert "none left" in console.export_text()


def test_a_modality_that_the_run_lacks_is_refused(made: Made) -> None:
    model, catalogue, _ = made
    with pytest.raises(ConfigError, match="--missing radar: no such modality; this run has image, record, series"):
        evaluate_model(model, catalogue, plan(drop=["radar"]))


def test_training_goes_on_as_if_nothing_had_been(made: Made) -> None:
    model, catalogue, _ = made
    model.train()
    before = torch.random.get_rng_state()
    evaluate_model(model, catalogue, plan())
    assert model.training and torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_scores_are_those_of_the_models_outputs(made: Made) -> None:
    from moemm.data import eval_loader

    model, catalogue, _ = made
    model.eval()
    right, count = 0, 0
    for batch in eval_loader(catalogue, task="tones", split="test", batch_size=7, prepare={}):
        with torch.no_grad():
            guess = model(batch).outputs["tones"].argmax(1)
        right, count = right + int((guess == batch.targets["tones"]).sum()), count + len(guess)
    assert evaluate_model(model, catalogue, plan())["tones"].value == pytest.approx(right / count)
    assert np.isfinite(right)
