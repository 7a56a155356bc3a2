"""Whole runs whose losses are weighed by their values over time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moemm.config import LoadedConfig
from moemm.errors import CheckpointError
from moemm.harmonize import SCALES
from moemm.observe.history import History
from moemm.observe.report import build_report
from moemm.observe.sections import conflict_section
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train
from moemm.train.callbacks import Callback
from moemm.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("alone")
OPTIONS: dict[str, dict[str, Any]] = {
    "uncertainty": {},
    "dwa": {"scale_window": 2},
    "famo": {"scale_rate": 0.2},
    "gradnorm": {"scale_rate": 0.2},
}
Load = Callable[..., LoadedConfig]


@pytest.fixture
def config(tmp_path: Path) -> Load:
    def make(kind: str, output: str = "run", **sections: dict[str, Any]) -> LoadedConfig:
        harmonize = {"scale": kind, **OPTIONS.get(kind, {}), **sections.pop("harmonize", {})}
        given = {"output": str(tmp_path / output), "steps": 8, "lr": 1e-2, "baselines": False}
        train_section = {**given, **sections.pop("train", {})}
        return tiny_config(tmp_path, train=train_section, harmonize=harmonize, **sections)

    return make


class Stop(Callback):
    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        if trainer.step == 5:
            trainer.stopped_by = 2


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == "train"]


@pytest.mark.parametrize("kind", list(SCALES))
def test_a_resume_is_the_run_that_was_never_interrupted(config: Load, tmp_path: Path, kind: str) -> None:
    options = {"accumulation": 2, "checkpoint": {"every": 5}}
    train(config(kind, output="whole", train=options))
    train(config(kind, train=options), extra_callbacks=[Stop()])
    assert lines(tmp_path / "run")[-1]["step"] == 5
    train(config(kind, train=options), resume=True)
    kept = [
        [(line["step"], line["loss"], line["loss_weights"]) for line in lines(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == 8
    newest = [tmp_path / name / "checkpoints" / "step_000008" for name in ("whole", "run")]
    newest = [load_file(folder / "model.safetensors") for folder in newest]
    assert newest[0].keys() == newest[1].keys() and any(name.startswith("scale.") for name in newest[0])
    assert all(bool((newest[0][name] == newest[1][name]).all()) for name in newest[0])
    assert max(kept[0][-1][2].values()) > 1.002, "the weights must move for this to mean anything"
    assert load_run(tmp_path / "run").model.scale is not None


def test_weights_are_told(config: Load, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    objectives = {"masked": {"weight": 1.0}, "similarity": {"weight": 1.0}}
    train(config("famo", objectives=objectives, harmonize={"method": "equal_norm"}))
    found = lines(tmp_path / "run")
    assert set(found[0]["loss_weights"]) == {"shapes", "tones", "masked", "similarity"}
    assert all(sum(line["loss_weights"].values()) == pytest.approx(4.0) for line in found)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert events.Scalars("loss_weight/masked")[-1].value == pytest.approx(found[-1]["loss_weights"]["masked"])
    section = conflict_section(History.read(tmp_path / "run" / "metrics.jsonl"))
    assert section.title == "Conflicts between losses" and "weight of similarity" in section.body
    assert "masked | similarity" in section.body


def test_without_conflicts_the_weights_stand_alone(config: Load, tmp_path: Path) -> None:
    train(config("dwa"))
    section = conflict_section(History.read(tmp_path / "run" / "metrics.jsonl"))
    assert section.title == "Weights of losses" and "oppose" not in section.lead
    assert "weight of tones" in section.body and "Weights of losses" in section.body
    assert section.body in build_report(load_run(tmp_path / "run"))


def test_a_run_without_tells_none(config: Load, tmp_path: Path) -> None:
    train(config("none"))
    assert all(line["loss_weights"] == {} for line in lines(tmp_path / "run"))


def test_a_resume_may_not_change_the_rule(config: Load) -> None:
    train(config("famo", train={"steps": 2}))
    with pytest.raises(CheckpointError, match=r"harmonize\.scale: was 'famo', is 'dwa'"):
        train(config("dwa", train={"steps": 2}), resume=True)


def test_a_run_that_begins_with_anothers_weights_has_a_state_of_its_own(config: Load, tmp_path: Path) -> None:
    train(config("gradnorm", output="first"))
    train(config("gradnorm", train={"init": str(tmp_path / "first"), "steps": 1}))
    assert lines(tmp_path / "run")[0]["loss_weights"] == {"shapes": 1.0, "tones": 1.0}
    before = load_file(tmp_path / "first" / "checkpoints" / "step_000008" / "model.safetensors")
    assert before["scale.weight_L"].max() > 1.1, "the weights must have moved for this to mean anything"
