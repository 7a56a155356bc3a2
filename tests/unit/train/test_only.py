"""train.only: what it names is trained, all else keeps its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from moemm.config import LoadedConfig, load_config
from moemm.errors import CheckpointError, ConfigError
from moemm.testing.tiny import tiny_config
from moemm.train import train
from moemm.train import trainer as trainer_module
from moemm.train.only import FrozenState, freeze
from moemm.train.setup import Setup, learn_modalities, seeded_model

pytestmark = pytest.mark.usefixtures("alone")
ONLY = ["heads.linear.tones.*", "*.experts.routed_1.*", "*.router.rows.all.routed_1", "*.router.bias_routed_1"]


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(name: str = "run", **sections: dict[str, Any]) -> LoadedConfig:
        train = {"output": str(tmp_path / name), "lr": 1e-2, "baselines": False, **sections.pop("train", {})}
        loaded = tiny_config(tiny_data, train=train, **sections)
        own = tmp_path / "tiny.yaml"
        own.write_text(yaml.safe_dump(yaml.safe_load(loaded.path.read_text())))
        return load_config(own)

    return make


def tensors(loaded: LoadedConfig, step: int) -> dict[str, torch.Tensor]:
    folder = Path(loaded.config.train.output) / "checkpoints" / f"step_{step:06d}"
    return load_file(folder / "model.safetensors")


def start(loaded: LoadedConfig) -> dict[str, torch.Tensor]:
    """The weights that a run of this seed begins with."""
    catalogue, specs = learn_modalities(loaded)
    setup = Setup(loaded.config, catalogue, specs, Path(), 0)
    with torch.random.fork_rng(devices=[]):
        return {name: value.clone() for name, value in seeded_model(setup, torch.device("cpu")).state_dict().items()}


BIASED = {"router": {"bias_rate": 0.1, "top_k": 1}}


def model(**more: Any) -> dict[str, Any]:
    groups = [{"kind": "shared", "width": 16}, {"kind": "modality", "width": 8}]
    groups.append({"kind": "routed", "count": 2, "width": 8})
    return {"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": groups}, **more}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
)
def test_all_that_it_does_not_name_keeps_its_bits(config: Any, stage: int, precision: str) -> None:
    train_section = {"only": ONLY, "precision": precision, "steps": 5}
    loaded = config(train=train_section, deepspeed={"zero_stage": stage}, model=model(**BIASED))
    before = start(loaded)
    train(loaded)
    after = tensors(loaded, 5)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    named = {name for name in before if any(part in name for part in ("linear.tones", "routed_1"))}
    assert moved <= named
    biases = {name for name in named if ".bias_routed" in name}
    assert moved >= named - biases and moved & biases, "a bias has no gradient; that of one layer may be back at 0"


def test_a_resumed_run_ends_as_one_that_went_through(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {"deepspeed": {"zero_stage": 2}, "model": model(**BIASED)}
    whole = config("whole", train={"only": ONLY, "precision": "bf16", "checkpoint": {"every": 3}}, **sections)
    train(whole)
    broken = config("broken", train={"only": ONLY, "precision": "bf16", "checkpoint": {"every": 3}}, **sections)
    one_step = trainer_module.Trainer._one_step

    def dies(self: Any, batches: Any) -> None:
        if self.step == 4:
            raise KeyboardInterrupt
        one_step(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.Trainer, "_one_step", dies)
        train(broken)
    train(broken, resume=True)
    one, two = tensors(whole, 6), tensors(broken, 6)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    with pytest.raises(CheckpointError, match=r"train\.only"):
        train(config("broken", train={"only": ONLY[:2], "precision": "bf16"}, **sections), resume=True)


def test_running_losses_that_are_not_named_stay(config: Any) -> None:
    only = ["heads.linear.shapes.*", "heads.pool.*"]
    contrastive = {"contrastive": {"weight": 0.1, "noisy_from": 0.0}}
    loaded = config(train={"only": only}, objectives=contrastive)
    before = start(loaded)
    train(loaded)
    after = tensors(loaded, 6)
    assert not after["pretext.objectives.contrastive.noise.seen_RP"].any()
    free = config("free", objectives=contrastive)
    train(free)
    assert tensors(free, 6)["pretext.objectives.contrastive.noise.seen_RP"].any(), "else the test above tells nothing"
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} <= {
        name for name in after if name.startswith(("heads.linear.shapes", "heads.pool"))
    }


def test_it_is_told_how_much_is_trained(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(config(train={"only": ["heads.linear.tones.bias"], "steps": 1}))
    assert "3 trained, as train.only says" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("only", "words"),
    [
        (["heads.linear.tone.*"], "no tensor of the model matches 'heads.linear.tone.\\*'\n  near it: heads.linear"),
        (["*.bias_routed_1"], "match no parameter that can be trained"),
    ],
)  # fmt: skip
def test_what_names_nothing_is_refused(config: Any, only: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train(config(train={"only": only}, model=model(**BIASED)))


def test_an_empty_list_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="only"):
        config(train={"only": []})


def test_frozen_buffers_are_put_back_and_others_are_not() -> None:
    one = nn.Module()
    one.register_buffer("kept", torch.zeros(2))
    one.register_buffer("free", torch.zeros(2))
    one.register_buffer("unsaved", torch.zeros(2), persistent=False)
    one.weight = nn.Parameter(torch.zeros(1))
    freeze(one, ["free", "weight"])
    state = FrozenState(one, ["free", "weight"])
    for buffer in one.buffers():
        buffer.add_(1.0)
    state.restore()
    assert [float(buffer.sum()) for buffer in one.buffers()] == [0.0, 2.0, 2.0]
    everything = FrozenState(one, None)
    one.kept.add_(1.0)  # type: ignore[operator]
    everything.restore()
    assert float(one.kept.sum()) == 2.0  # type: ignore[operator]
