"""Pretraining without labels, fine-tuning with few: `objectives`, `train.init`, `data.label_share`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load

from moemm.config import LoadedConfig, load_config
from moemm.config.schema import ObjectiveConfig
from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.labels import labelled_items
from moemm.errors import CheckpointError, ConfigError, HealthError
from moemm.objectives.masked import Masked
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train
from moemm.train.schedule import objective_weight

pytestmark = pytest.mark.usefixtures("alone")

PRETRAIN = {"supervised": {"weight": 0.0}, "masked": {"weight": 1.0}, "contrastive": {"weight": 0.5}}
TONES = {"name": "tones", "file": "tones.h5"}


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(output: str = "run", **sections: dict[str, Any]) -> LoadedConfig:
        options = {"output": str(tmp_path / output), "lr": 1e-2, "steps": 4, "baselines": False}
        loaded = tiny_config(tiny_data, train={**options, **sections.pop("train", {})}, **sections)
        own = tmp_path / f"{output}.yaml"
        own.write_text(yaml.safe_dump(yaml.safe_load(loaded.path.read_text())))
        return load_config(own)

    return make


def lines(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    path = max((folder / "checkpoints").glob("step_*")) / "model.safetensors"
    return load(path.read_bytes())  # not mapped: some tests spoil the file


def test_with_every_weight_zero_training_is_bit_identical(config: Any, tmp_path: Path) -> None:
    zero = {name: {"weight": 0.0} for name in ("masked", "contrastive", "similarity", "replaced")}
    train(config("a", model={"dropout": 0.1}))
    train(config("b", model={"dropout": 0.1}, objectives=zero))
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert [line["loss"] for line in lines(tmp_path / "a")] == [line["loss"] for line in lines(tmp_path / "b")]


def test_objectives_draw_nothing_from_the_generator_of_dropout(config: Any, tmp_path: Path) -> None:
    train(config("a", train={"steps": 1, "lr": 1e-9}, objectives={"masked": {"weight": 1e-6}}))
    train(config("b", train={"steps": 1, "lr": 1e-9}))
    a, b = (lines(tmp_path / name)[0]["losses"] for name in "ab")
    assert a == pytest.approx(b, abs=1e-6)


@pytest.mark.usefixtures("alone")
def test_reports_and_resume_bit_equal(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mix = {**PRETRAIN, "supervised": {"weight": 1.0}, "replaced": {"weight": 0.5, "start": 0.0}}
    options = {"steps": 6, "checkpoint": {"every": 3}}
    train(config("whole", train=options, objectives=mix))
    assert "masked " in capsys.readouterr().out
    assert all({"masked", "replaced"} <= line["objectives"].keys() for line in lines(tmp_path / "whole"))
    events = EventAccumulator(str(tmp_path / "whole" / "tensorboard"))
    events.Reload()
    assert {"objective/masked", "objective/contrastive", "objective/replaced"} <= set(events.Tags()["scalars"])
    again = tmp_path / "whole" / "checkpoints" / "step_000006" / "model.safetensors"
    before = weights(tmp_path / "whole")
    again.write_bytes(b"cut")
    train(config("whole", train=options, objectives=mix), resume=True)
    after = weights(tmp_path / "whole")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_without_labels_no_head_learns_and_no_task_is_reported(config: Any, tmp_path: Path) -> None:
    train(config(train={"weight_decay": 0.0}, objectives=PRETRAIN))
    train(config("fresh", train={"steps": 1, "lr": 1e-30, "weight_decay": 0.0}))
    after, fresh = weights(tmp_path / "run"), weights(tmp_path / "fresh")
    heads = [name for name in fresh if name.startswith("heads.")]
    assert all(torch.allclose(after[name], fresh[name], rtol=0, atol=1e-20) for name in heads)
    assert not torch.equal(after["trunk.blocks.0.attention.qkv.weight"], fresh["trunk.blocks.0.attention.qkv.weight"])
    assert all(line["losses"] == {} and line["accuracy"] == {} for line in lines(tmp_path / "run"))
    assert load_run(tmp_path / "run").step == 4


def test_the_weights_of_objectives_follow_their_schedules() -> None:
    falling = ObjectiveConfig(weight=0.2, start=1.0, over=0.5)
    found = [objective_weight(step, total=11, config=falling) for step in (0, 1, 5, 10)]
    assert found == pytest.approx([1.0, 0.84, 0.2, 0.2])
    assert objective_weight(3, total=11, config=ObjectiveConfig(weight=0.7)) == 0.7
    assert objective_weight(0, total=1, config=ObjectiveConfig(weight=0.7, start=0.1)) == 0.1


def test_a_schedule_from_zero_begins_without_the_objective(config: Any, tmp_path: Path) -> None:
    train(config("a", train={"steps": 1}, objectives={"masked": {"weight": 5.0, "start": 0.0}}))
    train(config("b", train={"steps": 1}))
    assert lines(tmp_path / "a")[0]["objectives"]["masked"] > 0
    difference = [lines(tmp_path / "a")[0][key] - lines(tmp_path / "b")[0][key] for key in ("loss", "router_loss")]
    assert difference[0] == pytest.approx(difference[1], abs=1e-6), "the router also sees the hidden view"


def test_fine_tuning_begins_with_the_weights_and_statistics_of_the_run(config: Any, tmp_path: Path) -> None:
    train(config("before", objectives=PRETRAIN))
    for init in ("before", "before/checkpoints/step_000004"):
        options = {"init": str(tmp_path / init), "steps": 1, "lr": 1e-30, "weight_decay": 0.0}
        name = f"after_{init.count('/')}"
        train(config(name, train=options))
        before, after = weights(tmp_path / "before"), weights(tmp_path / name)
        assert all(torch.allclose(after[key], before[key], rtol=0, atol=1e-20) for key in after)
        assert {key for key in before if key not in after} == {key for key in before if key.startswith("pretext.")}
        (message,) = (line["text"] for line in lines(tmp_path / name, "message") if "began with" in line["text"])
        assert f"began with {len(after)} of {len(after)} tensors" in message and "not used from there" in message


def test_a_subset_of_the_tasks_takes_what_is_shared(config: Any, tiny_data: Path, tmp_path: Path) -> None:
    train(config("before", objectives=PRETRAIN))
    stored = json.loads((tmp_path / "before" / "modalities.json").read_text())
    stored["series"]["fitted"]["mean"] = [7.0] * 4
    (tmp_path / "before" / "modalities.json").write_text(json.dumps(stored))
    only = {"root": str(tiny_data), "num_workers": 0, "tasks": [{**TONES, "name": "other"}]}
    train(config("after", data=only, train={"init": str(tmp_path / "before"), "steps": 1}))
    reused = json.loads((tmp_path / "after" / "modalities.json").read_text())
    assert list(reused) == ["series"] and reused["series"]["fitted"]["mean"] == [7.0] * 4
    text = lines(tmp_path / "after", "message")[0]["text"]
    assert "fresh here: heads.pool.query, heads.linear.other; not used from there: heads.linear.shapes" in text


def test_init_that_does_not_fit_says_why(config: Any, tiny_data: Path, tmp_path: Path) -> None:
    train(config("before", objectives=PRETRAIN))
    init = {"init": str(tmp_path / "before")}
    with pytest.raises(CheckpointError, match=r"model\.dim: was 16, is 32[\s\S]*Give the old values"):
        train(config("wide", train=init, model={"dim": 32}))
    with pytest.raises(CheckpointError, match="neither a run folder nor a checkpoint"):
        train(config("nowhere", train={"init": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"modalities\.series\.patch: is \[2\], and \[8\] in"):
        train(config("patch", train=init, modalities={"series": {"patch": [2]}}))
    with pytest.raises(ConfigError, match=r"train\.init: is train\.output; --resume goes on"):
        config("before", train=init)
    other = {"root": str(tiny_data), "num_workers": 0, "tasks": [{**TONES, "rename": {"series": "image"}}]}
    with pytest.raises(ConfigError, match="modality image has kind timeseries, and image in"):
        train(config("other", train=init, data=other))
    path = next((tmp_path / "before" / "checkpoints").glob("step_*/model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        train(config("cut", train=init))


def test_noise_of_the_new_run_counts_and_not_that_of_the_old(config: Any, tmp_path: Path) -> None:
    train(config("before", objectives=PRETRAIN, modalities={"series": {"noise": 0.5}}))
    train(
        config("after", train={"init": str(tmp_path / "before"), "steps": 1}, modalities={"series": {"dropout": 0.1}})
    )
    options = json.loads((tmp_path / "after" / "modalities.json").read_text())["series"]["options"]
    assert options["noise"] == 0.0 and options["dropout"] == 0.1


def test_labels_are_a_share_of_each_class_and_nested(tiny_data: Path) -> None:
    loaded = tiny_config(tiny_data)
    catalogue = build_catalogue(loaded.config.data, base=tiny_data)
    small, large = (labelled_items(catalogue, share=share, seed=3) for share in (0.1, 0.5))
    for number, task in enumerate(catalogue.tasks):
        targets = SplitDataset(catalogue, task=task.name, split="train").targets
        assert set(small[number].tolist()) <= set(large[number].tolist())
        for share, chosen in ((0.1, small[number]), (0.5, large[number])):
            wanted = [max(1, round(share * count)) for count in np.bincount(targets)]
            assert np.bincount(targets[chosen], minlength=3).tolist() == wanted
    again = labelled_items(catalogue, share=0.1, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(again, small, strict=True))
    other = labelled_items(catalogue, share=0.1, seed=4)
    assert not all(np.array_equal(a, b) for a, b in zip(other, small, strict=True))


class Seen:
    """The rows that reach the supervised loss, by index in the file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from moemm.train import step

        self.drawn: set[tuple[int, int]] = set()
        self.counted = 0
        real_losses, real_call = step.supervised_losses, step.Objective.__call__

        def losses(outputs: Any, targets: Any, tasks: Any, **options: Any) -> Any:
            self.counted += sum(len(one) for one in targets.values())
            return real_losses(outputs, targets, tasks, **options)

        def call(objective: Any, output: Any, batch: Any) -> Any:
            self.drawn |= set(zip(batch.task.tolist(), batch.index.tolist(), strict=True))
            return real_call(objective, output, batch)

        monkeypatch.setattr(step, "supervised_losses", losses)
        monkeypatch.setattr(step.Objective, "__call__", call)


def test_alone_only_labelled_samples_are_drawn_and_with_others_only_they_count(
    config: Any, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_config(tiny_data)
    catalogue = build_catalogue(loaded.config.data, base=tiny_data)
    share = {"root": str(tiny_data), "num_workers": 0, "tasks": loaded.config.data.tasks, "label_share": 0.1}
    share["tasks"] = [{"name": task.name, "file": task.file} for task in loaded.config.data.tasks]
    items = labelled_items(catalogue, share=0.1, seed=0)
    known = {
        (number, int(SplitDataset(catalogue, task=task.name, split="train").indices[item]))
        for number, task in enumerate(catalogue.tasks)
        for item in items[number]
    }
    seen = Seen(monkeypatch)
    train(config("few", data=share, train={"steps": None, "epochs": 3.0}))
    assert seen.drawn == known and seen.counted == 8 * 4, "three epochs of ten samples in batches of 8"
    mixed = Seen(monkeypatch)
    train(config("mixed", data=share, train={"steps": 12}, objectives={"masked": {"weight": 1.0}}))
    assert len(mixed.drawn) > 60 and 0 < mixed.counted < 0.3 * 12 * 8


def test_a_loss_that_is_not_finite_names_the_objective(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Masked.forward
    monkeypatch.setattr(
        Masked, "forward", lambda self, scene: (real(self, scene)[0] * float("nan"), scene.x["masked"].sum())
    )
    with pytest.raises(HealthError, match="rank 0, objective masked: the objective masked"):
        train(config(objectives=PRETRAIN, train={"health": {"max_faulty": 1}}))


def test_resume_with_other_objectives_names_the_key(config: Any) -> None:
    train(config(objectives=PRETRAIN))
    with pytest.raises(CheckpointError, match=r"objectives\.masked\.weight: was 1\.0, is 0\.0"):
        train(config(objectives={"contrastive": {"weight": 0.5}}, train={"steps": 6}), resume=True)


def test_the_recipes_pretrain_and_fine_tune(tmp_path: Path) -> None:
    recipes = Path(__file__).parents[3] / "configs" / "recipes"
    short = ["--train.steps", "2", "--train.baselines", "false", "--data.num_workers", "0"]
    before = [*short, "--train.output", str(tmp_path / "before")]
    train(load_config(recipes / "pretrain.yaml", before))
    after = [*short, "--train.output", str(tmp_path / "after"), "--train.init", str(tmp_path / "before")]
    summary = train(load_config(recipes / "finetune.yaml", after))
    assert len(summary["tasks"]) == 6
    assert load_config(recipes / "finetune.yaml").config.train.init == "runs/pretrain"
    assert load_config(recipes / "pretrain.yaml").config.train.output == "runs/pretrain"
