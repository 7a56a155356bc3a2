"""Extending runs: old parts keep their bits before and after training, whatever the router; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extended import write_new
from safetensors.torch import load_file, save_file

from moemm.config import load_config
from moemm.config.schema import ExpertGroupConfig as Group
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.errors import CheckpointError, ConfigError, DataError
from moemm.growth import extend, read_base
from moemm.growth.extension import Plan, closed
from moemm.growth.extension_choice import Trying
from moemm.growth.extension_proof import compare, old_batches
from moemm.growth.extension_trial import most_shifted, router_shift
from moemm.growth.receipt import weights_hash
from moemm.moe import ROUTERS, experts_of_groups
from moemm.testing.tiny import tiny_config
from moemm.train import train
from moemm.train import trainer as trainer_module

pytestmark = pytest.mark.usefixtures("alone")
QUICK = Trying(samples=24, steps=4)
SHORT = {"steps": 3, "lr": 1e-2}
GROUPS = [{"kind": "shared", "width": 16}, {"kind": "modality", "width": 8}, {"kind": "routed", "count": 3, "width": 8}]


def trained(folder: Path, name: str, data: Path, **model: Any) -> Path:
    """A tiny run of two steps."""
    own = {"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": model.pop("groups", GROUPS)}, **model}
    run = {"output": str(folder / name), "steps": 2, "batch_size": 8, "baselines": False, "lr": 1e-2}
    tasks = [{"name": "shapes", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5"}]
    loaded = tiny_config(data, model=own, train=run, data={"root": str(data), "num_workers": 0, "tasks": tasks})
    train(loaded)
    return folder / name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tiny_config(folder)
    for number, name in enumerate(("spectrum", "radar", "lidar", "echo", "touch")):
        write_new(folder / f"{name}_task.h5", name, seed=number)
    return folder


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    deterministic = torch.are_deterministic_algorithms_enabled()
    run = trained(tmp_path_factory.mktemp("base"), "run", data)
    torch.use_deterministic_algorithms(deterministic)
    return run


def planned(run: Path, folder: Path, which: str = "spectrum", **given: Any) -> Plan:
    options = {"modality": which, "data": folder / f"{which}_task.h5", "trying": QUICK, "training": SHORT, **given}
    return extend.plan(run, **options)


def proofs(receipt: extend.Extension) -> dict[str, float]:
    return {proof.what: proof.value for proof in receipt.proofs}


ALONE = [{"kind": "shared", "width": 16}, {"kind": "routed", "count": 2, "width": 8, "per_modality": True}]
ROUTERS_OF: dict[str, dict[str, Any]] = {
    **{kind: {"router": {"kind": kind, **({} if kind == "hard" else {"top_k": 2})}} for kind in sorted(ROUTERS)},
    "own": {"router": {"top_k": 2, "scope": "modality", "bias_rate": 0.05}},
    "disjoint": {"router": {"top_k": 2, "scope": "disjoint"}, "groups": ALONE},
}


@pytest.mark.parametrize("case", ROUTERS_OF)
def test_old_parts_keep_their_bits_through_training(data: Path, tmp_path: Path, case: str) -> None:
    run = trained(tmp_path, "run", data, **ROUTERS_OF[case])
    plan = planned(run, data, experts={"kind": "routed", "layers": "all"}, init="random")
    receipt = extend.apply(plan, output=tmp_path / "grown")
    assert receipt.ok and receipt.verify(old_batches(read_base(run)))
    found = proofs(receipt)
    assert found["old outputs that changed a bit right after the extension"] == 0
    assert found["old tensors whose bytes are not those of before"] == 0
    old, new = read_base(run).weights, read_base(tmp_path / "grown")
    assert new.run.step == 3
    assert all(torch.equal(value, new.weights[name]) for name, value in old.items())
    start = extend.apply(plan, output=tmp_path / "untrained", training=False)
    first = read_base(start.target).weights
    still = {name for name in set(first) - set(old) if torch.equal(first[name], new.weights[name])}
    assert all(".router." in name or ".experts." in name for name in still), f"all that is new was trained, not {still}"


def test_five_extensions_in_a_row_and_back(base: Path, data: Path, tmp_path: Path) -> None:
    runs, hashes = [base], [weights_hash(read_base(base).weights)]
    names = ("spectrum", "radar", "lidar", "echo", "touch")
    for number, name in enumerate(names):
        kind = "routed" if number % 2 else "modality"
        plan = planned(runs[-1], data, name, experts={"layers": str(number % 2), "kind": kind}, init="random")
        receipt = extend.apply(plan, output=tmp_path / name, training=False)
        assert receipt.ok, receipt.proofs
        runs.append(tmp_path / name)
        hashes.append(weights_hash(read_base(runs[-1]).weights))
    last = read_base(runs[-1])
    assert [one.name for one in last.run.config.model.extensions] == list(names)
    first = read_base(base).weights
    assert all(torch.equal(value, last.weights[name]) for name, value in first.items())
    middle = extend.remove(runs[-1], "echo", output=tmp_path / "x")
    assert middle.ok and [one.name for one in read_base(middle.target).run.config.model.extensions] == [
        "spectrum", "radar", "lidar", "touch",
    ]  # fmt: skip
    assert extend.remove(middle.target, "touch", output=tmp_path / "y").ok, "it came to a run with more than is left"
    assert weights_hash(read_base(tmp_path / "y").weights) == hashes[3]
    back = runs[-1]
    for number, name in reversed(list(enumerate(names))):
        receipt_back = extend.remove(back, name, output=tmp_path / f"back_{name}")
        assert receipt_back.ok
        back = tmp_path / f"back_{name}"
        assert weights_hash(read_base(back).weights) == hashes[number]
    assert load_config(back / "config.yaml").config.model == load_config(base / "config.yaml").config.model
    again = extend.apply(planned(back, data, init="random"), output=tmp_path / "again", training=False)
    assert again.ok, "what was removed can come again"


def test_a_plan_says_what_and_why_and_is_the_same_each_time(base: Path, data: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    plan = planned(base, data, experts={"per_layer": 2, "layers": "auto:0.5"}, private=["tokenizer", "norm", "head"])
    assert torch.equal(torch.get_rng_state(), state), "torch's own draws go on"
    assert plan == planned(base, data, experts={"per_layer": 2, "layers": "auto:0.5"})
    assert plan.modalities == ("spectrum",) and plan.tasks == ("spectrum_task",) and plan.touched == ()
    assert plan.experts == ("spectrum_0", "spectrum_1") and len(plan.layers) == 1
    shift = plan.measured["router_shift"]
    assert plan.layers == (int(max(shift, key=lambda layer: shift[layer])),)
    bits = plan.measured["zero_shot_bits"]
    assert set(bits) == {"modality_image", "modality_record", "modality_series", "routed_0", "routed_1", "routed_2"}
    best, second = sorted(bits, key=lambda name: bits[name])[:2]
    assert plan.sources == {"spectrum_0": {str(plan.layers[0]): best}, "spectrum_1": {str(plan.layers[0]): second}}
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
    assert {task["name"]: task["learn"] for task in plan.config["data"]["tasks"]} == {
        "shapes": False, "tones": False, "spectrum_task": True
    }  # fmt: skip
    assert not any("shapes" in name or "routed" in name for name in plan.config["train"]["only"])


def test_what_learns_alone_learns_faster(base: Path, data: Path, tmp_path: Path) -> None:
    def rate(run: Path, file: str, **given: Any) -> tuple[float, str]:
        made = extend.plan(run, data=data / f"{file}_task.h5", trying=QUICK, init="random", **given)
        return made.config["train"]["lr"], " ".join(made.changed)

    alone, told = rate(base, "spectrum")
    assert alone == pytest.approx(4e-2) and "4 times as fast as the run did: train.lr is 0.04" in told
    for given in ({"training": {"lr": 0.02}}, {"unfreeze": True}):
        kept, told = rate(base, "spectrum", **given)
        assert kept == (0.02 if "training" in given else 0.01) and "as fast" not in told
    first = extend.plan(base, data=data / "spectrum_task.h5", trying=QUICK, init="random")
    extend.apply(first, output=tmp_path / "first")
    again, told = rate(tmp_path / "first", "radar")
    assert again == alone and "as fast" not in told, "an extension's own rate is not raised once more"


def test_copies_are_copies_and_norms_begin_as_the_shared_ones(base: Path, data: Path, tmp_path: Path) -> None:
    old = read_base(base).weights
    plan = planned(base, data, experts={"layers": "1", "kind": "routed"}, init="routed_1")
    extend.apply(plan, output=tmp_path / "a", training=False)
    new = read_base(tmp_path / "a").weights
    for part in ("experts.{}.w1_FD", "experts.{}.w2_DF", "router.rows.all.{}"):
        name = f"trunk.blocks.1.ffn.{part}"
        assert torch.equal(new[name.format("spectrum")], old[name.format("routed_1")])
    assert not any(".0.ffn.experts.spectrum" in name for name in new)
    assert torch.equal(new["trunk.norm.own_norms.spectrum.weight"], old["trunk.norm.weight"])
    used = planned(base, data, experts={"layers": [0, 1]}, init="most_used")
    assert set(used.sources["spectrum"]) == {"0", "1"}
    assert set(used.sources["spectrum"].values()) <= {"routed_0", "routed_1", "routed_2"}
    bare = planned(base, data, private=["tokenizer", "head"], experts={"per_layer": 0})
    assert bare.experts == () and bare.sources == {}
    extend.apply(bare, output=tmp_path / "bare", training=False)
    assert not any("own_norms" in name or ".experts.spectrum" in name for name in read_base(tmp_path / "bare").weights)


def test_a_new_task_on_known_modalities(base: Path, data: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    series = [random.normal(size=(8, 4)).astype(np.float32) for _ in range(40)]
    values = {"series": ModalityData(kind="timeseries", values=series, ragged=True, rate_hz=100.0)}
    label = np.array([one.sum() > 0 for one in series]).astype(np.int64)
    split = (np.arange(40) % 4 > 1).astype(np.uint8) * (np.arange(40) % 4 - 1).clip(0).astype(np.uint8)
    write_file(
        tmp_path / "signs.h5", task="signs", labels={"label": LabelData(values=label)}, split=split, modalities=values
    )
    plan = extend.plan(base, data=tmp_path / "signs.h5", trying=QUICK, training=SHORT)
    assert plan.modalities == () and plan.visible_to == ("signs",) and plan.touched == ()
    receipt = extend.apply(plan, output=tmp_path / "grown")
    assert receipt.ok
    grown = read_base(tmp_path / "grown")
    tasks = {expert.id: expert.tasks for expert in grown.run.model.map.experts}  # type: ignore[union-attr]
    assert tasks["signs"] == ("signs",)
    assert receipt.verify()


def test_a_file_of_two_new_modalities(base: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    label, split = np.arange(40) % 2, np.array([0, 0, 1, 2] * 10, np.uint8)
    values = {
        name: ModalityData(kind="timeseries", values=random.normal(size=(40, 6, 5)).astype(np.float32))
        for name in ("left", "right")
    }
    labels = {"label": LabelData(values=label)}
    write_file(tmp_path / "arms.h5", task="arms", labels=labels, split=split, modalities=values)
    plan = extend.plan(base, data=tmp_path / "arms.h5", init="random", trying=QUICK, training=SHORT)
    assert plan.name == "arms" and plan.modalities == plan.visible_to == ("left", "right")
    assert extend.apply(plan, output=tmp_path / "grown").ok
    one = extend.plan(base, modality="left", data=tmp_path / "arms.h5", init="random", trying=QUICK)
    assert one.modalities == ("left",) and one.config["data"]["tasks"][-1]["modalities"] == ["left"]


def test_the_only_modality_of_a_file_may_be_called_as_another_in_the_run(base: Path, tmp_path: Path) -> None:
    write_new(tmp_path / "bells.h5", "series", columns=7)
    plan = extend.plan(base, modality="bells", data=tmp_path / "bells.h5", init="random", trying=QUICK, training=SHORT)
    task = plan.config["data"]["tasks"][-1]
    assert plan.modalities == ("bells",) and task["rename"] == {"series": "bells"} and task["modalities"] == ["bells"]
    assert extend.apply(plan, output=tmp_path / "grown").ok
    write_new(tmp_path / "both.h5", "series", images=True)
    with pytest.raises(ConfigError, match="has no modality 'bells'"):
        extend.plan(base, modality="bells", data=tmp_path / "both.h5", init="random", trying=QUICK)


def test_more_experts_for_a_known_modality(base: Path, tmp_path: Path) -> None:
    plan = extend.plan(base, visible_to=["series"], experts={"layers": "all"}, trying=QUICK, training=SHORT)
    assert plan.touched == ("tones",) and plan.name == "more_series"
    assert {task["name"]: task["learn"] for task in plan.config["data"]["tasks"]} == {"shapes": False, "tones": True}
    receipt = extend.apply(plan, output=tmp_path / "grown", training=False)
    found = proofs(receipt)
    assert receipt.ok and found["outputs of tones that changed a bit"] == 0, "they add nothing at first"
    receipt = extend.apply(plan, output=tmp_path / "trained")
    found = proofs(receipt)
    assert receipt.ok and found["outputs of tones that changed a bit"] > 0 and "tones: accuracy forgotten" in found
    assert found["outputs of shapes that changed a bit"] == 0 and "shapes: accuracy forgotten" not in found


def test_what_is_unfrozen_is_reported(base: Path, data: Path, tmp_path: Path) -> None:
    plan = planned(base, data, unfreeze=True, replay=True, init="random", experts={"layers": "all"})
    assert plan.config["train"]["only"] is None
    assert all(task["learn"] for task in plan.config["data"]["tasks"])
    receipt = extend.apply(plan, output=tmp_path / "grown")
    found = proofs(receipt)
    assert receipt.ok, "nothing is promised"
    assert found["old tensors whose bytes are not those of before"] > 0
    assert {"shapes: accuracy forgotten", "tones: accuracy forgotten"} <= set(found)
    gone = extend.remove(tmp_path / "grown", "spectrum", output=tmp_path / "back")
    assert gone.proofs[0].value == 1 and gone.ok, "it says that what is left is not what was there"


def test_training_that_was_stopped_goes_on(base: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    plan = planned(base, data, init="random", training={"steps": 6, "lr": 1e-2})
    every = {**plan.config, "train": {**plan.config["train"], "checkpoint": {"every": 2, "keep": 2}}}
    plan = replace(plan, config=every)
    extend.apply(plan, output=tmp_path / "whole")
    extend.apply(plan, output=tmp_path / "broken", training=False)
    one_step = trainer_module.Trainer._one_step

    def dies(self: Any, batches: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        one_step(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.Trainer, "_one_step", dies)
        train(load_config(tmp_path / "broken" / "config.yaml"), resume=True)
    train(load_config(tmp_path / "broken" / "config.yaml"), resume=True)
    receipt = extend.check(tmp_path / "broken")
    assert receipt.ok
    one, two = (read_base(tmp_path / name).weights for name in ("whole", "broken"))
    assert weights_hash(one) == weights_hash(two)
    assert json.loads((tmp_path / "broken" / "receipt.json").read_text())["ok"]


def test_a_changed_old_tensor_is_found(base: Path, data: Path, tmp_path: Path) -> None:
    receipt = extend.apply(planned(base, data, init="random"), output=tmp_path / "grown", training=False)
    file = tmp_path / "grown" / "checkpoints" / "step_000000" / "model.safetensors"
    weights = load_file(file)
    weights["heads.linear.shapes.bias"][0] += 1e-6
    base_, grown = read_base(base), read_base(tmp_path / "grown")
    grown.run.model.load_state_dict(weights)
    found = compare(base_, replace(grown, weights=weights), receipt.details)
    assert [proof.ok for proof in found] == [False, False, True], "a tensor, the outputs of shapes, not those of tones"
    save_file(weights, file)
    with pytest.raises(CheckpointError):
        receipt.verify()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"modality": "image"}, ConfigError, "modality image exists in"),
        ({"modality": "spectra"}, None, ""),
        ({"task": "tones"}, ConfigError, "task tones exists"),
        ({"label": "labels"}, ConfigError, "has no label 'labels'; did you mean label"),
        ({"data": None}, ConfigError, "no data: a new modality or task is learned from a file"),
        ({"experts": {"per_layers": 1}}, ConfigError, "no option 'per_layers'; did you mean per_layer"),
        ({"experts": {"per_layer": -1}}, ConfigError, "per_layer is -1"),
        ({"experts": {"layers": "2"}}, ConfigError, "experts.layers: '2' names layer 2; the model has 0 to 1"),
        ({"experts": {"layers": "auto:2"}}, ConfigError, "'auto:2' is no share of the layers"),
        ({"experts": {"width": 9, "layers": "all"}}, ConfigError, "no old expert of width 9 stands in all of the la"),
        ({"experts": {"kind": "shared"}}, ConfigError, "experts.kind is 'shared'; allowed: modality, routed"),
        ({"init": "routed_7", "experts": {"layers": "all"}}, ConfigError, "no expert 'routed_7' of width 8"),
        ({"visible_to": ["spectrums"]}, ConfigError, "no modality or task 'spectrums'; did you mean spectrum"),
        ({"private": ["norm"]}, ConfigError, "tokenizer and head, which an extension always has of its own"),
        ({"private": ["tokenizer", "head", "body"]}, ConfigError, "private is tokenizer, head, body"),
        ({"replay": True}, ConfigError, "replay trains on old tasks, which changes nothing"),
        ({"name": "routed_0"}, ConfigError, "the name 'routed_0' is taken by an expert"),
        ({"name": "a.b"}, ConfigError, "'a.b' is no name of an extension"),
        ({"options": {"patches": [2]}}, ConfigError, "a modality has no option 'patches'"),
        ({"training": {"step": 2}}, ConfigError, "`train` has no key 'step'; did you mean steps"),
        ({"training": {"steps": 0}}, ConfigError, r"train\.steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(base: Path, data: Path, given: Any, error: Any, words: str) -> None:
    if error is None:
        assert planned(base, data, init="random", **given).config["data"]["tasks"][-1]["rename"] == {
            "spectrum": "spectra"
        }
        return
    with pytest.raises(error, match=words):
        planned(base, data, **{"init": "random", **given} if "experts" not in given else given)


def test_files_that_do_not_fit(base: Path, data: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    label, split = np.arange(40) % 2, (np.arange(40) % 4 == 3).astype(np.uint8)
    wide = {
        "spectrum": ModalityData(
            kind="timeseries", values=random.normal(size=(40, 6, 5)).astype(np.float32), ragged=True
        ),
        "series": ModalityData(kind="timeseries", values=[np.ones((6, 7), np.float32)] * 40, ragged=True),
    }
    write_file(
        tmp_path / "wide.h5", task="wide", labels={"label": LabelData(values=label)}, split=split, modalities=wide
    )
    with pytest.raises(DataError, match=r"disagree about modality 'series': shape \(4,\) against \(7,\)"):
        extend.plan(base, modality="spectrum", data=tmp_path / "wide.h5", trying=QUICK)
    rows = [None if one % 4 == 3 else np.ones((6, 5), np.float32) for one in range(40)]
    pictures = random.normal(size=(40, 1, 8, 8)).astype(np.float32)
    values = {"spectrum": ModalityData(kind="timeseries", values=rows, ragged=True),
              "image": ModalityData(kind="image", values=pictures, layout="CHW")}  # fmt: skip
    write_file(
        tmp_path / "no_val.h5", task="none", labels={"label": LabelData(values=label)}, split=split, modalities=values
    )
    with pytest.raises(DataError, match="no sample of split val has spectrum: nothing to choose experts and layers by"):
        extend.plan(base, modality="spectrum", data=tmp_path / "no_val.h5", trying=QUICK)
    assert extend.plan(base, data=tmp_path / "no_val.h5", experts={"layers": "all"}, init="random").layers == (0, 1)


def test_runs_that_do_not_fit(base: Path, data: Path, tmp_path: Path) -> None:
    dense = trained(tmp_path, "dense", data, moe="dense")
    with pytest.raises(ConfigError, match=r"has no MoE layers \(model.moe: dense\)"):
        planned(dense, data)
    with pytest.raises(CheckpointError, match="no run folder"):
        planned(tmp_path / "nothing", data)
    plan = planned(base, data, init="random")
    other = trained(tmp_path, "other", data, activation="relu2")
    with pytest.raises(ConfigError, match="the plan of spectrum was made for another checkpoint than the one in"):
        extend.apply(replace(plan, run=str(other)), output=tmp_path / "x")
    extend.apply(plan, output=tmp_path / "grown", training=False)
    with pytest.raises(ConfigError, match="already holds a run"):
        extend.apply(plan, output=tmp_path / "grown")
    second = planned(tmp_path / "grown", data, "radar", init="random")
    extend.remove(tmp_path / "grown", "spectrum", output=tmp_path / "back")
    with pytest.raises(ConfigError, match="made for another checkpoint"):
        extend.apply(replace(second, run=str(tmp_path / "back")), output=tmp_path / "y")
    with pytest.raises(ConfigError, match="has no extension 'spectrum'; it has none"):
        extend.remove(tmp_path / "back", "spectrum", output=tmp_path / "z")
    with pytest.raises(ConfigError, match="no extension 'spectrumm'; it has spectrum; did you mean spectrum"):
        extend.remove(tmp_path / "grown", "spectrumm", output=tmp_path / "z")
    with pytest.raises(CheckpointError, match="is no extended run: it has no receipt"):
        extend.check(base)
    with pytest.raises(CheckpointError, match="the receipt of extend remove"):
        extend.check(tmp_path / "back")
    assert not any((tmp_path / name).exists() for name in ("x", "y", "z")), "nothing was written"


def test_a_layer_that_serves_nobody_new_is_told(data: Path, tmp_path: Path) -> None:
    """Without shared or open routed experts each layer needs one of the new ones."""
    run = trained(tmp_path, "run", data, groups=[{"kind": "modality", "width": 8}])
    with pytest.raises(ConfigError, match="spectrum reaches no expert in layer 1"):
        planned(run, data, experts={"layers": "0"}, init="random")
    with pytest.raises(ConfigError, match=r"layers auto:0\.5: cannot be measured"):
        planned(run, data, experts={"layers": "auto:0.5"})
    assert planned(run, data).layers == (0, 1), "all, where nothing can be measured and nothing was said"


def test_what_counts_losses_cannot_be_extended(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scaled"
    run = {"output": str(folder), "steps": 2, "batch_size": 8, "baselines": False}
    train(tiny_config(data, train=run, harmonize={"scale": "uncertainty"}))
    with pytest.raises(ConfigError, match=r"cannot be extended: scale\.\S+ has shape \(2,\) and has shape \(3,\)"):
        planned(folder, data, init="random")


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    for text in ("{}", "[1]", "no", '{"format": 1, "run": "x"}'):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(CheckpointError, match="is no plan"):
            Plan.load(tmp_path / "plan.json")


def test_closed_groups_make_the_same_experts_and_none_for_others() -> None:
    names = ["a", "b", "c"]
    groups = [
        Group(kind="shared", width=4), Group(kind="modality", width=4, modalities=["a", "b"]),
        Group(kind="modality", width=4, count=2), Group(kind="modality", width=4, id="own"),
        Group(kind="routed", width=4, count=2, per_modality=True), Group(kind="zero", per_modality=True, id="none"),
        Group(kind="routed", width=4, count=2), Group(kind="modality", width=4, tasks=["t"]),
    ]  # fmt: skip
    before = [one for made in experts_of_groups(groups, names, 2) for one in made]
    after = [one for made in experts_of_groups(closed(groups, names), [*names, "new"], 2) for one in made]
    assert after == before
    everybody = closed([Group(kind="modality", width=4, modalities=names), Group(kind="modality", width=4)], names)
    assert len(everybody) == 1, "a group that made nothing would make an expert for what is new"


def test_layers_whose_routers_shift_most() -> None:
    old_LE = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    new_LE = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.9, 0.1]])
    shift = router_shift(old_LE, new_LE, [0, 2, 5])
    assert shift == pytest.approx({0: 0.1, 2: 0.5, 5: 0.0})
    assert most_shifted(shift, 0.5) == (0, 2)
    assert most_shifted(shift, 0.01) == (2,)
    assert most_shifted({0: 0.0, 1: 0.0}, 0.5) == (0,)
