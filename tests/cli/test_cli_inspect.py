"""`moemm inspect` and `moemm analyze heterogeneity` on the tiny run, as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from moemm.cli.app import main
from moemm.config import load_config
from moemm.observe.expert_table import render_experts
from moemm.testing.tiny import tiny_config

ROOT = Path(__file__).parents[2]
GROUPS = [
    {"kind": "shared", "width": 16},
    {"kind": "modality", "width": 8},
    {"kind": "modality", "width": 4, "modalities": ["image", "series"], "tasks": ["tones"], "layers": "0"},
    {"kind": "routed", "count": 2, "width": 8},
    {"kind": "zero", "modalities": ["image"], "layers": "0"},
    {"kind": "lora", "base": "routed_0", "rank": 2, "layers": "0"},
]
Call = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.yaml, its data, and a run of six steps."""
    place = tmp_path_factory.mktemp("tiny")
    tiny_config(place, train={"output": str(place / "run"), "steps": 6, "batch_size": 8, "baselines": False})
    done = subprocess.run(
        [sys.executable, "-m", "moemm", "train", place / "tiny.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        return (code, *capsys.readouterr())

    return run


def test_inspect_a_run_needs_no_data(call: Call, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    code, out, _ = call("inspect", tmp_path / "run")
    assert code == 0 and out.splitlines()[1] == "checkpoint  step 6"
    assert "│ modality_record │ modality │     8 │        256 │ ·b·            │" in out


def test_inspect_a_run_and_its_configuration_agree(call: Call, folder: Path) -> None:
    run, config = (json.loads(call("inspect", folder / name, "--json")[1]) for name in ("run", "tiny.yaml"))
    assert run.pop("step") == 6 and config.pop("step") is None and run.pop("as_saved") and config.pop("as_saved")
    assert run.pop("subject") != config.pop("subject")
    assert run == config
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert run["parameters"] == {"total": summary["params_total"], "active": summary["params_active"]}


def test_every_kind_of_expert_and_skills(call: Call, tmp_path: Path) -> None:
    tiny_config(tmp_path, model={"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": GROUPS}})
    code, out, _ = call("inspect", tmp_path / "tiny.yaml")
    assert code == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    first = {row[0]: row[1:] for row in rows if len(row) == 6 and row[1] in {group["kind"] for group in GROUPS}}
    assert first["modality_image_series_tones"] == ["modality", "4", "128", "a·c", "tones"]
    assert first["zero_image_0"] == ["zero", "0", "0", "a··", "all"]
    assert first["lora_0"] == ["lora", "routed_0 + 2", "96", "abc", "all"]
    assert "layer 0, 48 parameters of the router" not in out and "layer 0, 64 parameters of the router" in out
    assert "layer 1, 32 parameters of the router" in out
    found = json.loads(call("inspect", tmp_path / "tiny.yaml", "--json")[1])
    by_task = {entry["name"]: entry["active_by_task"] for entry in found["modalities"]}
    assert by_task["image"]["tones"] - by_task["image"]["shapes"] == 128, "the skill's expert"
    assert by_task["record"]["tones"] == by_task["record"]["shapes"]


def test_a_dense_model_has_no_experts(call: Call, folder: Path) -> None:
    code, out, _ = call("inspect", folder / "tiny.yaml", "--model.moe", "dense")
    assert code == 0 and "router      none" in out and "layers 0, 1: one dense network of 1,024 parameters" in out


def test_twelve_modalities_and_twenty_experts_fit_in_100_columns() -> None:
    names = [f"modality_name_{number:02d}" for number in range(12)]
    expert = {"kind": "modality", "width": 512, "parameters": 1_048_576, "base": None, "rank": 0}
    experts = [
        {**expert, "id": f"family_number_{n}", "modalities": names[n % 12 :], "tasks": ["left"]} for n in range(20)
    ]
    values = {
        "parameters": {"total": 123_456_789, "active": 12_345_678},
        "router": {"kind": "softmax", "scope": "joint", "top_k": None, "gates": "raw", "losses": {"balance": 0.01}},
        "own": {"untie": ["norms", "qkv"], "latents": 8, "share": [names[:3], names[3:6]]},
        "tasks": ["left"],
        "modalities": [
            {"name": n, "kind": "timeseries", "tokenizer": 123_456, "active": 9_999_999, "active_by_task": {"left": 1}}
            for n in names
        ],
        "layers": [{"layers": [0, 1], "experts": experts, "router": 1, "dense": None}],
    }
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render_experts(values, title="x"))
    lines = console.export_text().splitlines()
    assert any(line.startswith("own         norms, qkv, 8 latents of each modality; shared by:") for line in lines)
    assert max(map(len, lines)) <= 100
    assert sum("family_number_" in line for line in lines) == 20 and "·····f··" not in lines
    assert any("family_number_11" in line and "···········l" in line and "left" in line for line in lines)


def test_inspect_says_what_is_wrong(call: Call, folder: Path, tmp_path: Path) -> None:
    code, _, error = call("inspect", tmp_path / "nowhere")
    assert code == 2 and "no such run folder or configuration" in error
    code, _, error = call("inspect", tmp_path)
    assert code == 4 and "is no run folder: it has no config.yaml" in error
    code, _, error = call("inspect", folder / "run", "--model.dim", "8")
    assert code == 2 and "--model.dim cannot change it" in error
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "catalogue.json").write_text('{"tasks": [{"name": "t"}]}')
    code, _, error = call("inspect", tmp_path / "run")
    assert code == 4 and "catalogue.json of the run does not describe tasks" in error


def test_another_map_than_the_saved_one_is_said(call: Call, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["model"]["experts"]["groups"][2]["count"] = 3
    path.write_text(yaml.safe_dump(values))
    _, out, _ = call("inspect", tmp_path / "run")
    assert out.splitlines()[1] == "checkpoint  step 6, saved with another expert map than config.yaml has"


def test_heterogeneity_of_a_run_is_ready_to_train(call: Call, folder: Path) -> None:
    code, out, error = call("analyze", "heterogeneity", folder / "run", "--groups", "2", "--samples", "16")
    assert code == 0, error
    path = folder / "run" / "heterogeneity" / "grouped.yaml"
    assert out.rstrip().endswith(f"to train    moemm train {path}")
    loaded = load_config(path)
    groups = loaded.config.model.experts.groups
    families = [group.modalities for group in groups if group.kind == "modality"]
    assert len(families) == 2 and sorted(name for family in families for name in family) == [
        "image",
        "record",
        "series",
    ]
    assert loaded.config.train.output == str(folder / "run") + "-grouped"
    assert load_config(folder / "tiny.yaml").data_root.resolve() == loaded.data_root.resolve()
    with (path.parent / "grouped.zero-shot.modalities.csv").open() as file:
        assert [row[0] for row in csv.reader(file)][1:] == ["image", "record", "series"]
    code, out, error = call("inspect", path)
    assert code == 0 and "family_1" in out, error


def test_heterogeneity_of_a_configuration_within_a_budget(call: Call, folder: Path, tmp_path: Path) -> None:
    before = json.loads(call("inspect", folder / "tiny.yaml", "--json")[1])["parameters"]["total"]
    path = tmp_path / "new" / "mine.yaml"
    arguments = ["--budget", before - 1, "--samples", 16, "--pairs", "--output", path, "--json"]
    code, out, error = call("analyze", "heterogeneity", folder / "tiny.yaml", *arguments)
    assert code == 0, error
    values = json.loads(out)
    assert values["measure"] == "pvi" and len(values["groups"]) == 2
    assert values["parameters"] == {"before": before, "after": before - 2 * 2 * 16 * 8}
    assert json.loads(call("inspect", path, "--json")[1])["parameters"]["total"] == values["parameters"]["after"]
    assert values["pairs"] is None, "there is one pair: nothing to compare it with"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "--groups", "2", "--budget", "100000"], "give one of them"),
        (["tiny.yaml", "--groups", "4"], "there are only 3 modalities: image, record, series"),
        (["tiny.yaml", "--groups", "-1"], "must be at least 1"),
        (["tiny.yaml", "--samples", "1"], "--samples 1: must be at least 2"),
        (["tiny.yaml", "--budget", "10"], "with one expert for all modalities the model has"),
        (["tiny.yaml", "--measure", "zero-shot"], "needs the trained experts of a run"),
        (["run", "--pairs"], "add --measure pvi"),
        (["tiny.yaml", "--model.experts.groups", "[{kind: shared, width: 8}]"], "no group of kind modality"),
    ],
)
def test_heterogeneity_says_what_is_wrong(call: Call, folder: Path, arguments: list[str], message: str) -> None:
    code, out, error = call("analyze", "heterogeneity", folder / arguments[0], *arguments[1:])
    assert code == 2 and message in error and not out


def test_heterogeneity_cannot_write(call: Call, folder: Path) -> None:
    arguments = ["--samples", 4, "--groups", 2, "--output", folder / "tiny.yaml" / "x.yaml"]
    code, _, error = call("analyze", "heterogeneity", folder / "run", *arguments)
    assert code == 2 and "--output: cannot write" in error
