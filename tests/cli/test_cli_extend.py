"""`moemm extend` in one line, in two steps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moemm.cli import app
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.testing.tiny import tiny_config
from moemm.train import train

pytestmark = pytest.mark.usefixtures("alone")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny run, and beside it spectra.h5."""
    run = {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 8, "baselines": False}
    train(tiny_config(tmp_path, train=run))
    random = np.random.default_rng(0)
    label, split = np.arange(40) % 2, np.array([0, 0, 1, 2] * 10, np.uint8)
    values = {"spectrum": ModalityData(kind="timeseries", values=random.normal(size=(40, 6, 5)).astype(np.float32))}
    write_file(
        tmp_path / "spectra.h5", task="minerals", labels={"label": LabelData(values=label)}, split=split,
        modalities=values,
    )  # fmt: skip
    return tmp_path / "run"


def test_one_line_does_it_and_others_follow(base: Path, capsys: Capture) -> None:
    data, quick = str(base.parent / "spectra.h5"), ["--samples", "16", "--trial-steps", "2"]
    assert app.main(["extend", str(base), "--data", data, *quick, "--train.steps", "3"]) == 0
    printed = capsys.readouterr()
    grown = base.parent / "run-spectrum"
    assert "through modality_image" in printed.err and "the router shifts by" in printed.err
    assert "outputs of tones that changed a bit" in printed.out and "minerals: accuracy on test" in printed.out
    receipt = json.loads((grown / "receipt.json").read_text())
    assert receipt["ok"] and receipt["details"]["modalities"] == ["spectrum"]
    assert json.loads((grown / "summary.json").read_text())["steps"] == 3
    assert app.main(["extend", "check", str(grown), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["proofs"] == receipt["proofs"], "the same model gives the same proofs"
    assert app.main(["extend", "remove", str(grown), "--name", "spectrum", "--output", str(base.parent / "back")]) == 0
    assert "weights whose sha256 is not that of before" in capsys.readouterr().out


def test_a_plan_can_be_read_before_it_is_carried_out(base: Path, capsys: Capture) -> None:
    plan = base.parent / "plan.json"
    common = ["extend", str(base), "--plan", str(plan)]
    new = ["--data", str(base.parent / "spectra.h5"), "--init", "random", "--layers", "all", "--kind", "routed"]
    assert app.main([*common, *new, "--shared-norms", "--options", '{"noise": 0.1}']) == 0
    assert "expert spectrum (routed, width 8) in layers 0, 1: drawn; for spectrum" in capsys.readouterr().out
    assert json.loads(plan.read_text())["config"]["modalities"]["spectrum"]["noise"] == 0.1
    assert app.main([*common, "--no-train", "--output", str(base.parent / "grown")]) == 0
    assert "to train" in capsys.readouterr().out
    assert not (base.parent / "grown" / "summary.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--modality", "image", "--data", "spectra.h5"], 2, "modality image exists in"),
        (["--modality", "spectrum"], 2, "no data: a new modality or task"),
        (["--data", "nothing.h5"], 3, "nothing.h5"),
        (["--data", "spectra.h5", "--model.dim", "32"], 2, "--model.dim: moemm extend takes keys of `train` alone"),
        (["--data", "spectra.h5", "--train.stepps", "3"], 2, "did you mean"),
        (["--data", "spectra.h5", "--options", "{"], 2, "is no JSON"),
        (["--data", "spectra.h5", "--options", "[1]"], 2, "must be a mapping"),
        (["--data", "spectra.h5", "--output", "run"], 2, "already holds a run"),
    ],
)
def test_what_is_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(base.parent)
    assert app.main(["extend", "run", *arguments]) == code
    assert words in capsys.readouterr().err


def test_folders_and_launchers_that_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert app.main(["extend", "nowhere"]) == 4
    assert app.main(["extend", "check", str(base)]) == 4
    assert "is no extended run" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["extend", str(base), "--data", str(base.parent / "spectra.h5")]) == 2
    assert "moemm extend runs in one process" in capsys.readouterr().err
