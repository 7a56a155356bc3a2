"""`moemm analyze conflict` as a user calls it, on runs whose labels are opposite by design."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from opposed import opposed_config, plant

from moemm.cli.app import main
from moemm.config import load_config
from moemm.testing.tiny import tiny_config
from moemm.train import train

GROUPS = [
    {"kind": "shared", "width": 16},
    {"kind": "modality", "width": 8},
    {"kind": "routed", "count": 4, "width": 8, "layers": "1"},
]
QUICK = ("--batches", 8, "--samples", 48)
Call = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what training printed
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


def opposed_run(folder: Path, **changes: Any) -> Path:
    """A run with checkpoints of steps 2 and 4 in which the gradients of its tasks are opposite."""
    checkpoint = {"every": 2, "keep": 3}
    loaded = opposed_config(folder, **{"groups": GROUPS, "checkpoint": checkpoint, **changes})
    assert train(loaded)["exit_code"] == 0
    plant(folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def by_modality(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opposed_run(tmp_path_factory.mktemp("modality"))


def test_opposite_tasks_of_two_modalities_get_modality_experts(call: Call, by_modality: Path, tmp_path: Path) -> None:
    code, out, error = call("analyze", "conflict", by_modality, *QUICK)
    assert code == 0, error
    path = by_modality / "conflict" / "split.yaml"
    assert (
        "8 batches of 48 samples, at steps 2, 4" in out
        and "Experts by modality: 100% of it is between modalities" in out
    )
    assert out.rstrip().endswith(f"to train    moemm train {path}")
    loaded = load_config(path)
    groups = loaded.config.model.experts.groups
    assert [(g.kind, g.layers, g.per_modality) for g in groups] == [
        ("modality", "all", False), ("modality", "0,1", False), ("routed", "1", True)
    ]  # fmt: skip
    assert loaded.config.train.output == f"{by_modality}-split"
    values = json.loads((by_modality / "conflict" / "conflict.json").read_text())
    shared = next(one for one in values["parts"] if one["title"] == "1 expert shared")
    assert max(shared["cos"]) < -0.7 and shared["opposed"] == [1.0, 1.0] and shared["same"] == [0.0, 0.0]
    assert {"modality_u", "modality_v"}.isdisjoint(one["name"] for one in values["parts"]), "one loss reaches each"
    assert call("train", path, "--train.output", tmp_path / "split", "--train.steps", 3)[0] == 0
    again = json.loads(call("analyze", "conflict", tmp_path / "split", *QUICK, "--json")[1])
    kinds = {one["kind"] for one in again["parts"]}
    assert "attention" in kinds and not kinds & {"expert", "experts", "group"}, "no expert is left that both reach"


def test_the_run_is_left_with_scalars_and_a_section_of_its_report(call: Call, by_modality: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second time replaces the first
        assert call("analyze", "conflict", by_modality, *QUICK, "--json")[0] == 0
    values = json.loads((by_modality / "conflict" / "conflict.json").read_text())
    events = EventAccumulator(str(by_modality / "tensorboard" / "conflict"))
    events.Reload()
    found = events.Scalars("layer_conflict/1_expert_shared/a | b")
    assert [one.step for one in found] == values["steps"] == [2, 4]
    shared = next(one for one in values["parts"] if one["title"] == "1 expert shared")
    assert [one.value for one in found] == pytest.approx(shared["cos"])
    code, _, error = call("report", by_modality, "--quick")
    assert code == 0, error
    html = (by_modality / "report.html").read_text()
    assert "Where losses pull parameters apart" in html and "Experts one by one, step 4" in html
    assert f"{shared['cos'][-1]:+.2f}" in html and "experts by modality" in html
    (by_modality / "conflict" / "conflict.json").write_text('{"steps": []}')
    code, _, error = call("report", by_modality, "--quick")
    assert code == 4 and "it lacks batches, lasting, losses" in error and "moemm analyze conflict" in error


def test_opposite_tasks_of_one_modality_get_experts_by_task(call: Call, tmp_path: Path) -> None:
    run = opposed_run(tmp_path, modalities=("u", "u"))
    path = tmp_path / "new" / "mine.yaml"
    code, out, error = call("analyze", "conflict", run, *QUICK, "--output", path, "--json")
    assert code == 0, error
    values = json.loads(out)
    assert {one["remedy"] for one in values["remedies"]} == {"task", None} and values["written"] == str(path)
    assert values["parameters"]["after"] > values["parameters"]["before"]
    groups = yaml.safe_load(path.read_text())["model"]["experts"]["groups"]
    assert [group["tasks"] for group in groups] == [["a"], ["b"]] * 3
    assert call("train", path, "--train.output", tmp_path / "split", "--train.steps", 2)[0] == 0


def test_labels_that_share_samples_and_labels_that_agree_write_nothing(call: Call, tmp_path: Path) -> None:
    run = opposed_run(tmp_path / "joint", joint=True, modalities=("u", "u"), checkpoint={})
    code, out, error = call("analyze", "conflict", run, *QUICK)
    assert code == 0, error
    assert "No split: within each modality, of labels that share each sample; harmonize can weigh them" in out
    assert "experts of their own help none of these" in out and "the run keeps one checkpoint, step 4" in out
    assert "to train" not in out and not (run / "conflict" / "split.yaml").exists()
    run = opposed_run(tmp_path / "same", inverted=False)
    code, out, error = call("analyze", "conflict", run, *QUICK)
    assert code == 0 and "no lasting conflict" in out, error
    assert not (run / "conflict" / "split.yaml").exists() and (run / "conflict" / "conflict.json").exists()


def test_objectives_without_labels_are_losses_too(call: Call, tmp_path: Path) -> None:
    objectives = {"masked": {"weight": 1.0}, "contrastive": {"weight": 0.5}}
    loaded = tiny_config(tmp_path, objectives=objectives, train={"output": str(tmp_path / "run"), "steps": 3,
                         "batch_size": 8, "baselines": False})  # fmt: skip
    assert train(loaded)["exit_code"] == 0
    first, again = (json.loads(call("analyze", "conflict", tmp_path / "run", *QUICK, "--json")[1]) for _ in range(2))
    assert first["losses"] == ["shapes", "tones", "objective masked", "objective contrastive"]
    assert first == again, "masks and dropout are drawn anew by the seed"
    met = {tuple(one["losses"]) for one in first["parts"] if one["title"] == "layer 0"}
    assert len(met) == 6
    cos = [one["cos"][0] for one in first["parts"] if one["losses"] == ["shapes", "objective masked"]]
    assert len(cos) > 8 and all(value is not None and abs(value) <= 1.0 for value in cos)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["run", "--batches", "0"], 2, "--batches 0: must be at least 2"),
        (["run", "--samples", "0"], 2, "--samples 0: must be at least 1"),
        (["run", "--least", "1"], 2, "--least 1.0: must be from 0 to less than 1"),
        (["nowhere"], 4, "nowhere"),
        (["opposed.yaml"], 4, "opposed.yaml"),
        ([""], 4, "is no run folder: it has no config.yaml"),
        (["run", "--output", "opposed.yaml/x.yaml"], 2, "--output: cannot write"),
    ],
)
def test_it_says_what_is_wrong(call: Call, by_modality: Path, arguments: list[str], code: int, message: str) -> None:
    places = {name: str(by_modality.parent / name) for name in arguments if not name.startswith("--") and not
              name.replace(".", "").isdigit()}  # fmt: skip
    found = call("analyze", "conflict", *QUICK, *(places.get(name, name) for name in arguments))
    assert (found[0], found[1]) == (code, "") and message in found[2]


def test_broken_checkpoints_are_told_and_none_is_refused(call: Call, by_modality: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(by_modality, run)
    (run / "checkpoints" / "step_000002" / "model.safetensors").write_bytes(b"")
    code, out, error = call("analyze", "conflict", run, *QUICK)
    assert code == 0 and "left out    step_000002/model.safetensors has 0 bytes" in out, error
    for folder in (run / "checkpoints").glob("step_*"):
        (folder / "manifest.json").unlink()
    code, out, error = call("analyze", "conflict", run, *QUICK)
    assert code == 4 and "manifest.json" in error and not out


def test_a_run_with_one_task_is_refused(call: Call, tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, data={"root": str(tmp_path), "num_workers": 0, "tasks": [{"name": "tones", "file":
                         "tones.h5"}]}, train={"steps": 1, "output": str(tmp_path / "run"), "batch_size": 8,
                         "baselines": False})  # fmt: skip
    assert train(loaded)["exit_code"] == 0
    code, out, error = call("analyze", "conflict", tmp_path / "run")
    assert code == 2 and "has one loss, tones: there is nothing for it to be in conflict with" in error and not out
