"""Whole runs that stand in for absent modalities, and what `moemm evaluate --missing all` leaves in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moemm.cli import app
from moemm.observe import plots
from moemm.testing.tiny import tiny_config
from moemm.train import train
from moemm.train.step import MicroLoss

pytestmark = pytest.mark.usefixtures("alone")


def run_of(folder: Path, kind: str, **missing: Any) -> Path:
    schedule = {"modality_dropout": 0.5, "modality_dropout_start": 0.1, "modality_dropout_over": 0.5}
    data = {"root": str(folder), "num_workers": 0, "tasks": [{"name": "shapes", "file": "shapes.h5"}], **schedule}
    output = {"output": str(folder / "run"), "baselines": False, "steps": 4, "batch_size": 8, "log_every": 1}
    model = {"dim": 16, "heads": 2, "missing": {"kind": kind, **missing}}
    assert train(tiny_config(folder, data=data, train=output, model=model))["exit_code"] == 0
    return folder / "run"


def test_a_run_that_predicts_reports_its_loss_and_is_scored_on_every_subset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "predict", weight=0.5, width=8)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "train"]
    assert max(line["missing_loss"] for line in steps) > 0, "0 in a step where each sample has one modality"
    for line in steps:
        total = line["router_loss"] + line["missing_loss"] + line["losses"]["shapes"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    weights = load_file(max((run / "checkpoints").glob("step_*")) / "model.safetensors")
    assert weights["missing.decode.record.0.weight"].shape == (8, 8)
    capsys.readouterr()
    assert app.main(["evaluate", str(run), "--missing", "all"]) == 0
    text = capsys.readouterr().out
    assert "mean over 3 subsets" in text and "missing.csv" in text
    assert len((run / "missing.csv").read_text().splitlines()) == 4
    assert (run / "missing.png").stat().st_size > 5000 and (run / "missing.svg").exists()


def test_json_is_json_and_a_folder_that_cannot_be_written_to_is_a_clean_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path, "bank")
    capsys.readouterr()
    assert app.main(["evaluate", str(run), "--missing", "all", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["missing"] == "all" and len(result["tasks"]["shapes"]["subsets"]) == 3

    def full(figure: Any, path: Path) -> list[Path]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "save_figure", full)
    assert app.main(["evaluate", str(run), "--missing", "all"]) == 4
    assert "No space left on device" in capsys.readouterr().err
    assert app.main(["evaluate", str(run), "--missing", "all,image"]) == 2
    assert "--missing all: no such modality" in capsys.readouterr().err


def test_a_regression_that_is_not_finite_is_named() -> None:
    nan, fine = torch.tensor(float("nan")), torch.tensor(1.0)
    rest = {"pretext": {"masked": (fine, fine)}, "outputs": {}, "targets": {}}
    loss = MicroLoss(backward=nan, parts_L=nan[None], sums_T=torch.ones(2), router=fine, missing=nan, **rest)
    assert loss.broken(("a", "b")) == ["missing"]
