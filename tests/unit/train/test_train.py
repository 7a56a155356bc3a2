"""Whole runs in this process, on data made up for it."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moemm.config import LoadedConfig, load_config
from moemm.data import cost
from moemm.data.sample import PackedBatch
from moemm.errors import CheckpointError, ConfigError, HealthError
from moemm.testing.tiny import tiny_config
from moemm.train import load_outline, load_run, train
from moemm.train import trainer as trainer_module
from moemm.train.callbacks import Callback
from moemm.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(**sections: dict[str, Any]) -> LoadedConfig:
        train = {"output": str(tmp_path / "run"), "lr": 1e-2, **sections.pop("train", {})}
        loaded = tiny_config(tiny_data, train=train, **sections)
        own = tmp_path / "tiny.yaml"  # one file a test: tests may run side by side
        own.write_text(yaml.safe_dump(yaml.safe_load(loaded.path.read_text())))
        return load_config(own)

    return make


class Interrupt(Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        if trainer.step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def lines(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


def weights(folder: Path) -> bytes:
    newest = max((folder / "checkpoints").glob("step_*"))
    return (newest / "model.safetensors").read_bytes()


def test_a_task_that_does_not_learn_is_scored_and_never_drawn(config: Any, tmp_path: Path) -> None:
    tasks = [{"name": "shapes", "file": "shapes.h5", "learn": False}, {"name": "tones", "file": "tones.h5"}]
    loaded = config(
        data={"root": config().config.data.root, "num_workers": 0, "tasks": tasks}, train={"epochs": 1.0, "steps": None}
    )
    summary = train(loaded)
    assert summary["steps"] == 6, "48 samples of tones alone are an epoch"
    assert set(summary["tasks"]) == {"shapes", "tones"}
    assert all(set(line["losses"]) == {"tones"} for line in lines(tmp_path / "run"))


def test_run_leaves_everything_behind(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = config(train={"steps": 8, "log_every": 3, "eval_every": 4, "checkpoint": {"every": 2, "keep": 2}})
    summary = train(loaded)
    run = tmp_path / "run"
    assert summary == {**json.loads((run / "summary.json").read_text()), "exit_code": 0}
    for task in summary["tasks"].values():
        assert task["metric"] == "accuracy" and task["n"] == 24
        assert 0 <= task["val"] <= 1 and 0 <= task["test"] <= 1
        assert set(task["baseline"]) == {"model", "val", "test"}
    assert summary["steps"] == 8 and summary["seconds"] > 0 and summary["tokens_per_second"] > 0
    assert 0 < summary["params_active"] < summary["params_total"]
    assert len(summary["config_hash"]) == 12 and summary["versions"]["torch"]
    assert [line["step"] for line in lines(run)] == [3, 6, 8]
    assert [(line["step"], line["split"]) for line in lines(run, "scores")] == [(4, "val"), (8, "val"), (8, "test")]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_000006", "step_000008"]
    assert (run / "checkpoints" / "latest").read_text() == "step_000008\n"
    assert {"config.yaml", "modalities.json", "catalogue.json"} <= {path.name for path in run.iterdir()}
    assert list((run / "tensorboard").glob("events.*"))
    printed = capsys.readouterr().out
    assert "step 8/8" in printed and "scikit-learn" in printed and "shapes" in printed


def test_tensorboard_has_losses_accuracies_and_loads(config: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(train={"steps": 4, "log_every": 2}))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "loss/shapes", "accuracy/tones", "val_accuracy/shapes", "train/lr"} <= tags
    loads = [f"load/layer_1/routed_{number}" for number in range(2)]
    assert sum(events.Scalars(tag)[0].value for tag in loads) == pytest.approx(1.0)
    assert "evenness/layer_0/image" in tags and "dead_experts/layer_1" in tags
    assert [event.step for event in events.Images("routing/layer_1")][-1] == 4


def test_metrics_hold_what_the_routers_did(config: Any, tmp_path: Path) -> None:
    train(config(train={"steps": 5, "log_every": 2}))
    (names,) = lines(tmp_path / "run", "routing_names")
    assert names["experts"] == ["routed_0", "routed_1"] and names["rows"] == ["image", "record", "series"]
    found = lines(tmp_path / "run", "routing")
    assert [line["step"] for line in found] == [2, 4, 5]
    for line in found:
        chosen = torch.tensor(line["load"]).sum(-1)
        assert chosen.tolist() == [line["tokens"]] * 2, "top_k is 1: one choice a token and layer"
        assert torch.tensor(line["prob"]).sum(-1)[0].tolist() == pytest.approx(line["tokens"], abs=0.1)
    images = sum(line["tokens"][0] for line in found)
    assert images > 0 and images <= 5 * 8


def test_alarms_reach_the_terminal_and_the_file(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    monkeypatch.setattr(
        trainer_module.RoutingAlarm, "check", lambda self, routing: reports.append(routing) or ["warning: layer 7"]
    )
    train(config(train={"steps": 2, "log_every": 2}))
    assert "step 2  warning: layer 7" in [message["text"] for message in lines(tmp_path / "run", "message")]
    assert "step 2  warning: layer 7" in capsys.readouterr().out
    assert reports[0].load_LME.shape == (2, 3, 2)


def test_a_router_that_collapses_is_told(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moemm.observe.alarm.CHOICES", 1)

    class Collapse(Callback):
        def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
            for layer in trainer.engine.model.trunk.routed_layers.values():
                for row in layer.router.parameters():
                    row.data.zero_()  # equal logits: the first expert takes all

    train(config(train={"steps": 16, "lr": 1e-9}), extra_callbacks=[Collapse()])
    text = "\n".join(message["text"] for message in lines(tmp_path / "run", "message"))
    assert "keeps to expert routed_0 (100% of its choices" in text
    assert "no token chose expert routed_1" in text and "raise model.router.losses.balance (now 0.01)" in text


def test_an_outline_has_the_shapes_but_not_the_weights(config: Any, tmp_path: Path) -> None:
    train(config(train={"steps": 3}))
    run, outline = load_run(tmp_path / "run"), load_outline(tmp_path / "run")
    assert outline.step == run.step == 3 and outline.config == run.config
    assert [task.name for task in outline.catalogue.tasks] == ["shapes", "tones"]
    assert outline.catalogue.modalities == run.catalogue.modalities
    assert outline.model.num_parameters() == run.model.num_parameters()
    with pytest.raises(CheckpointError, match="is no run folder"):
        load_outline(tmp_path)


def test_same_seed_same_run_other_seed_another(config: Any, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = {"steps": 4, "seed": seed, "output": str(tmp_path / name)}
        train(config(train=options, model={"dropout": 0.1}))
        found.append((weights(tmp_path / name), [line["loss"] for line in lines(tmp_path / name)]))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_ctrl_c_saves_and_resume_goes_on_bit_equal(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"steps": 9, "eval_every": 3}
    dropout = {"dropout": 0.2}
    train(config(train={**options, "output": str(tmp_path / "whole")}, model=dropout))
    stopped = train(config(train=options, model=dropout), extra_callbacks=[Interrupt(4)])
    assert stopped == {"exit_code": 130, "steps": 5}
    assert "stopped by SIGINT; saved step 5. Go on with" in capsys.readouterr().out
    run = tmp_path / "run"
    assert not (run / "summary.json").exists()
    assert train(config(train=options, model=dropout), resume=True)["steps"] == 9
    assert "(step 5)" in capsys.readouterr().out
    assert weights(run) == weights(tmp_path / "whole")
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(tmp_path / "whole")]


def test_lines_of_steps_that_a_resume_goes_back_behind_are_dropped(config: Any, tmp_path: Path) -> None:
    options = {"steps": 6, "checkpoint": {"every": 3}}
    train(config(train=options))
    newest = tmp_path / "run" / "checkpoints" / "step_000006"
    (newest / "model.safetensors").write_bytes(b"cut")
    train(config(train=options), resume=True)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert any("skipped step_000006" in line["text"] for line in lines(tmp_path / "run", "message"))


def test_finished_run_is_not_written_over(config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(config(train={"steps": 2}))
    before = weights(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds a finished run[\s\S]*--resume[\s\S]*--train.output"):
        train(config(train={"steps": 2}))
    capsys.readouterr()
    assert train(config(train={"steps": 2}), resume=True) == first
    assert "scikit-learn" in capsys.readouterr().out
    assert weights(tmp_path / "run") == before


def test_resume_without_a_run_begins_anew(config: Any) -> None:
    assert train(config(train={"steps": 1}), resume=True)["steps"] == 1


def test_resume_of_a_run_that_was_killed_in_its_first_save_begins_anew(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off = tmp_path / "run" / "checkpoints" / "step_000002.tmp"
    cut_off.mkdir(parents=True)
    (cut_off / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"a run with checkpoints[\s\S]*--resume"):
        train(config(train={"steps": 1}))
    assert train(config(train={"steps": 1}), resume=True)["steps"] == 1
    assert "step_000002.tmp was never completed: training from the start" in " ".join(capsys.readouterr().out.split())
    assert sorted(path.name for path in cut_off.parent.iterdir()) == ["latest", "step_000001"]
    (cut_off.parent / "step_000001").rename(cut_off.parent / "step_000001.old")
    with pytest.raises(CheckpointError, match="No complete checkpoint"):  # it holds what could be put back
        train(config(train={"steps": 1}), resume=True)


def test_resume_says_which_settings_changed(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(train={"steps": 1}))
    train(config(train={"steps": 1}), resume=True)
    assert "settings that changed" not in capsys.readouterr().out
    train(config(train={"steps": 2}, data={"temperature": 2.0}), resume=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "settings that changed since step 1: data.temperature: was 1.0, is 2.0, train.steps: was 1, is 2" in said


def test_data_that_is_slow_to_read_is_named(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(train={"steps": 1, "output": str(tmp_path / "before")}))
    assert "to decode" not in capsys.readouterr().out
    monkeypatch.setattr(cost, "CACHE_BYTES", 0)
    monkeypatch.setattr(cost, "_MOST", 0.1)
    train(config(train={"steps": 1}))
    said = " ".join(capsys.readouterr().out.split())
    assert "tones.h5: /modalities/series/data: a sample of" in said and "`moemm data repack OLD NEW`" in said


def test_resume_with_a_changed_model_names_the_keys(config: Any) -> None:
    train(config(train={"steps": 1}))
    changed = config(train={"steps": 2}, model={"dim": 32, "layers": 1})
    with pytest.raises(CheckpointError) as caught:
        train(changed, resume=True)
    assert "model.dim: was 16, is 32" in str(caught.value)
    assert "model.layers: was 2, is 1" in str(caught.value)


def test_resume_with_other_modalities_names_both(config: Any, tiny_data: Path) -> None:
    train(config(train={"steps": 1}))
    fewer = config(train={"steps": 2}, data={"root": str(tiny_data), "tasks": [{"name": "tones", "file": "tones.h5"}]})
    with pytest.raises(CheckpointError, match=r"3 modalities \(image, record, series\).*1 \(series\)"):
        train(fewer, resume=True)


def test_no_checkpoint_left_is_said(config: Any, tmp_path: Path) -> None:
    train(config(train={"steps": 1}))
    only = tmp_path / "run" / "checkpoints" / "step_000001"
    path = only / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"No complete checkpoint[\s\S]*cut short"):
        train(config(train={"steps": 2}), resume=True)
    with pytest.raises(CheckpointError, match="No complete checkpoint"):
        load_run(tmp_path / "run")


def test_load_run_has_the_weights_that_were_saved(config: Any, tmp_path: Path) -> None:
    from moemm.evaluate import EvaluationPlan, evaluate_model
    from moemm.modalities import prepare_functions

    summary = train(config(train={"steps": 3}))
    run = load_run(tmp_path / "run")
    assert run.step == 3 and not run.model.training
    plan = EvaluationPlan(split="test", prepare=prepare_functions(run.specs))
    for name, score in evaluate_model(run.model, run.catalogue, plan).items():
        assert score.value == summary["tasks"][name]["test"]
    with pytest.raises(CheckpointError, match="no run folder"):
        load_run(tmp_path)


class Broken:
    """The real loader, with one image of batch `step` infinite."""

    def __init__(self, loader: Any, step: int) -> None:
        self._loader, self._step = loader, step

    def __iter__(self) -> Any:
        for number, batch in enumerate(iter(self._loader)):
            if number == self._step:
                self._break(batch)
            yield batch

    def _break(self, batch: PackedBatch) -> None:
        row = 1
        batch.modalities["image"].fields["data"][row] = math.inf
        self.index = int(batch.index[batch.modalities["image"].sample[row]])

    def close(self) -> None:
        self._loader.close()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_loss_names_step_task_and_sample(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    real, made = trainer_module.train_loader, []

    def loader(*arguments: Any, **options: Any) -> Broken:
        made.append(Broken(real(*arguments, **options), step=3))
        return made[0]

    monkeypatch.setattr(trainer_module, "train_loader", loader)
    options = {"steps": 6, "checkpoint": {"every": 2}, "health": {"max_faulty": 1}}
    with pytest.raises(HealthError) as caught:
        train(config(train=options, deepspeed={"zero_stage": stage}))
    assert "loss of step 4 is not finite" in str(caught.value)
    said = f"router: sample {made[0].index} of task shapes has an infinite value in modality image\nNothing"
    assert said in str(caught.value), "one infinite value reaches other samples, but only its own is to blame"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == ["step_000002"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_gradient_that_is_not_finite_is_neither_applied_nor_saved(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    class Explode(Callback):
        def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
            if trainer.step == 2:
                first = next(p for p in trainer.engine.model.parameters() if p.requires_grad)
                first.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(HealthError, match="gradient of step 3 has the norm"):
        options = {"checkpoint": {"every": 1}, "health": {"max_faulty": 1}}
        train(config(train=options, deepspeed={"zero_stage": stage}), extra_callbacks=[Explode()])
    assert all(torch.isfinite(value).all() for value in load_run(tmp_path / "run").model.state_dict().values())


def test_a_faulty_step_is_done_without_what_breaks_it(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, made = trainer_module.train_loader, []

    def loader(*arguments: Any, **options: Any) -> Broken:
        made.append(Broken(real(*arguments, **options), step=3))
        return made[0]

    monkeypatch.setattr(trainer_module, "train_loader", loader)
    assert train(config(train={"steps": 6}))["steps"] == 6
    (event,) = lines(tmp_path / "run", "left_out")
    assert (event["step"], event["what"], event["in_a_row"]) == (4, "loss", 1)
    assert event["left_out"] == {"modalities": ["image"], "tasks": []}
    assert event["samples"] == [["shapes", made[0].index]]
    said = "The loss of step 4 is not finite: modality image was left out of it on all ranks"
    assert said in " ".join(capsys.readouterr().out.split())
    assert all(torch.isfinite(value).all() for value in load_run(tmp_path / "run").model.state_dict().values())
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))


def test_a_step_that_nothing_mends_is_left_out_and_several_end_it(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Explode(Callback):
        def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
            if trainer.step == 2:
                self.before = [p.detach().clone() for p in trainer.engine.model.parameters()]
                last = list(trainer.engine.model.heads.parameters())[-1]
                last.register_hook(lambda gradient: gradient * math.nan)  # every attempt reaches it
            elif trainer.step > 2:
                now = trainer.engine.model.parameters()
                assert all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True))

    options = {"steps": 9, "log_every": 1, "health": {"max_faulty": 3}}
    with pytest.raises(HealthError, match=r"gradient of step 5[\s\S]*3 steps in a row were faulty"):
        train(config(train=options), extra_callbacks=[Explode()])
    assert [(event["step"], event["left_out"]) for event in lines(tmp_path / "run", "left_out")] == [
        (3, None),
        (4, None),
    ]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2], "nothing to report of steps that were left out"
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_a_spike_is_left_out_before_it_is_applied(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moemm.train.spikes.LEAST", 3)

    class Overconfident(Callback):
        def on_start(self, info: Any) -> None:
            self.before: list[torch.Tensor] = []

        def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
            now = [p.detach().clone() for p in trainer.engine.model.parameters()]
            if trainer.step == 1:

                def hook(module: Any, inputs: Any, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                    return {name: 1e3 * one for name, one in outputs.items()} if trainer.step == 5 else outputs

                trainer.engine.model.heads.register_forward_hook(hook)
            if trainer.step == 6:
                assert all(torch.equal(a, b) for a, b in zip(self.before, now, strict=True))
            self.before = now

    train(config(train={"steps": 8, "health": {"spike": 50.0}}), extra_callbacks=[Overconfident()])
    (event,) = lines(tmp_path / "run", "left_out")
    assert (event["step"], event["what"], event["left_out"]) == (6, "spike", None)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 7, 8]


def test_experts_in_plain_torch_train_to_the_same_loss(config: Any, tmp_path: Path) -> None:
    losses = {}
    for backend in ("auto", "torch"):
        output = tmp_path / backend
        train(config(model={"experts": {"backend": backend}}, train={"output": str(output), "baselines": False}))
        losses[backend] = [line["loss"] for line in lines(output)]
    assert losses["auto"] == pytest.approx(losses["torch"], rel=1e-4)


def test_resume_may_change_who_runs_the_experts(config: Any) -> None:
    train(config(train={"steps": 1}, model={"experts": {}}))
    changed = config(train={"steps": 2}, model={"experts": {"backend": "torch"}})
    assert train(changed, resume=True)["steps"] == 2
