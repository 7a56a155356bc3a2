"""Diversified multiplet upcycling: stages inside labels, assembly, routers; and batches within labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from growth_cases import DENSE, trained

from moemm.cli.app import main
from moemm.config import load_config
from moemm.errors import ConfigError
from moemm.growth import Wanted, read_base, upcycle
from moemm.growth.multiplet import crossed, features
from moemm.growth.upcycling import Start
from moemm.train import load_run

CONTRASTIVE = {"contrastive": {"weight": 1.0}}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run that has learned to align the modalities of its samples, besides its tasks."""
    return trained(tmp_path_factory.mktemp("aligned"), model=DENSE, objectives=CONTRASTIVE, data={"root": "."})


def test_all_stages_run_one_after_the_other(aligned: Path, tmp_path: Path, alone: None) -> None:
    out, said = tmp_path / "out", []
    wanted = Wanted(method="multiplet", output=out, experts=3, clusters=2, steps=3)
    receipt = upcycle(aligned, wanted, tell=said.append)
    assert receipt.ok, receipt.proofs
    assert [line.split(":")[0] for line in said[1:4]] == ["stage 1 of 2", "stage 2 of 2", "routers"]
    source, made = load_run(aligned).model.state_dict(), load_run(out).model.state_dict()
    stages = [load_run(out / "stages" / str(number)).model.state_dict() for number in (1, 2)]
    for number, own in enumerate((source, *stages)):
        expert = made[f"trunk.blocks.1.ffn.experts.routed_{number}.w1_FD"]
        assert torch.equal(expert, own["trunk.blocks.1.ffn.shared.shared.w1_FD"])
    assert not torch.equal(
        stages[0]["trunk.blocks.1.ffn.shared.shared.w1_FD"], stages[1]["trunk.blocks.1.ffn.shared.shared.w1_FD"]
    )
    for name, value in source.items():
        if ".ffn." not in name:
            assert torch.equal(made[name], value), name
    router = load_run(out / "stages" / "router").model.state_dict()
    assert all(torch.equal(made[name], value) for name, value in router.items())
    config = load_config(out / "config.yaml").config
    assert config.train.only is None and config.data.within is None and config.model.router.top_k == 2
    assert config.model.router.losses.balance == 0.01
    assert load_config(out / "stages" / "2" / "config.yaml").config.train.only == ["trunk.blocks.*.ffn.*"]


def test_features_and_labels(aligned: Path) -> None:
    start = Start.of_run(read_base(aligned))
    found = features(start.model, start)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"shapes": (48, 16), "tones": (48, 16)}
    lengths = torch.cat(list(found.values())).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(96))


def test_labels_are_crossed() -> None:
    corners = {"a": torch.tensor([[0.0, 0], [0, 0], [9, 9]]), "b": torch.tensor([[9.0, 9], [9, 9]])}
    first = crossed({"a": np.zeros(3, np.int64), "b": np.zeros(2, np.int64)}, corners, 2, seed=0)
    assert first["a"][0] == first["a"][1] != first["a"][2] == first["b"][0] == first["b"][1]
    again = crossed({"a": np.array([0, 1, 0]), "b": np.array([0, 1])}, corners, 2, seed=0)
    assert len(set(again["a"].tolist()) | set(again["b"].tolist())) == 4, "what was apart stays apart"
    one = crossed({"a": np.zeros(3, np.int64)}, {"a": torch.ones(3, 2)}, 4, seed=0)
    assert one["a"].tolist() == [0, 0, 0], "fewer samples than clusters"


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [({"experts": 1}, "at least 2"), ({"clusters": 1}, "must be at least 2"), ({"steps": 0}, "must be at least 1"),
     ({"drop": 0.5}, "no meaning"), ({"experts": 2, "top_k": 3}, "there are 2 experts")],
)  # fmt: skip
def test_options_that_do_not_fit(wanted: dict[str, Any], problem: str, aligned: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        upcycle(aligned, Wanted(method="multiplet", output=tmp_path / "out", **wanted))
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_the_command_line(aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], alone: None) -> None:
    words = ["--method", "multiplet", "--experts", "2", "--steps", "1", "--clusters", "2", "--json"]
    assert main(["upcycle", str(aligned), "--output", str(tmp_path / "out"), *words]) == 0
    out = capsys.readouterr().out
    assert out.startswith("{") and out.rstrip().endswith("}"), "what training prints is not part of the receipt"
