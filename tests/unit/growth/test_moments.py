"""`moemm upcycle --optimizer keep`: training goes on where it stood, with the moments of what experts were made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import TRUNK, WIDTH, sparse, trained

from moemm.checkpoint import newest_complete
from moemm.checkpoint.state import Moments
from moemm.config import load_config
from moemm.errors import ConfigError
from moemm.growth import Receipt, Wanted, upcycle
from moemm.testing.tiny import tiny_config
from moemm.train import train

STEPS = 6
TRAIN: dict[str, Any] = {"steps": 2 * STEPS, "epochs": None, "log_every": 1, "baselines": False, "eval_every": 0}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run without dropout, stopped at half of its steps; `whole` beside it went through to the end."""
    folder = tmp_path_factory.mktemp("dense")
    model = {**TRUNK, "dropout": 0.0, "experts": {"groups": [{"kind": "shared", "width": WIDTH}]}}
    for name, steps in (("half", STEPS), ("whole", 2 * STEPS)):
        constant = {**TRAIN, "steps": steps, "min_lr": 1.0, "warmup": 0.0, "output": str(folder / name)}
        trained(folder, model=model, train=constant)
    return folder / "half"


def losses(run: Path) -> dict[int, float]:
    """Step -> loss without the router's own."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] - line["router_loss"] for line in lines if line["event"] == "train"}


def go_on(run: Path) -> dict[int, float]:
    """Losses of a grown run that is trained to the end."""
    train(load_config(run / "config.yaml", [f"--train.steps={2 * STEPS}"]), resume=True)
    return losses(run)


def moments_of(run: Path) -> Moments:
    """Of the newest checkpoint."""
    found = newest_complete(run / "checkpoints")
    moments = Moments.read(found.folder, found.manifest.files)
    assert moments is not None
    return moments


def grown(source: Path, target: Path, **wanted: Any) -> Receipt:
    """Upcycle, and keep the optimizer."""
    return upcycle(source, Wanted(output=target, optimizer="keep", **wanted))


def test_a_network_cut_in_two_learns_as_the_whole_one(dense: Path, tmp_path: Path, alone: None) -> None:
    groups = [{"kind": "shared", "width": 8}, {"kind": "shared", "width": WIDTH - 8}]
    constant = {**TRAIN, "min_lr": 1.0, "warmup": 0.0, "output": "unused"}
    tiny_config(tmp_path, model={**TRUNK, "dropout": 0.0, "experts": {"groups": groups}}, train=constant)
    receipt = grown(dense, tmp_path / "two", recipe=tmp_path / "tiny.yaml")
    assert receipt.optimizer.startswith("kept: moments of 41 of 41 tensors"), receipt.optimizer
    ours, theirs = go_on(tmp_path / "two"), losses(dense.parent / "whole")
    assert list(ours) == list(range(STEPS + 1, 2 * STEPS + 1)), "its first step is the one behind the source's last"
    assert [ours[step] for step in ours] == pytest.approx([theirs[step] for step in ours], rel=2e-5)

    upcycle(dense, Wanted(output=tmp_path / "anew", recipe=tmp_path / "tiny.yaml"))
    anew = go_on(tmp_path / "anew")
    assert abs(anew[STEPS] / theirs[2 * STEPS] - 1) > 1e-3, "with a fresh optimizer it is another run"


def test_moments_follow_weights_and_gradients(dense: Path, tmp_path: Path, alone: None) -> None:
    receipt = grown(dense, tmp_path / "out", experts=4)
    assert f"training goes on at step {STEPS} of the schedule" in receipt.changed
    assert "begin with their gradients on the probe batch: trunk.blocks.*.ffn.router.rows." in receipt.optimizer
    before, after = moments_of(dense), moments_of(tmp_path / "out")
    assert after.steps == before.steps == STEPS
    first, second = (after.values[key] for key in ("exp_avg", "exp_avg_sq"))
    experts = [name for name in first if ".ffn.experts." in name]
    (source,) = (
        value for name, value in before.values["exp_avg"].items() if "blocks.0.ffn.shared" in name and "w1" in name
    )
    mine = [first[name] for name in experts if "blocks.0" in name and name.endswith("w1_FD")]
    assert len(mine) == 4
    for one in mine:
        cosine = torch.nn.functional.cosine_similarity(one.flatten(), source.flatten(), dim=0)
        assert cosine == pytest.approx(1.0, abs=1e-5) and one.norm() < source.norm(), "a share of the tokens"
    rows = [name for name in first if ".router.rows." in name]
    assert rows and all(not first[name].any() and (second[name] > 0).all() for name in rows)
    assert max(go_on(tmp_path / "out").values()) < 2 * losses(dense)[STEPS], "its steps are not too long"


def test_more_experts_of_experts_keep_it_too(tmp_path: Path, alone: None) -> None:
    model = sparse({"top_k": 1}, {"kind": "routed", "count": 2, "width": 8})
    run = trained(tmp_path, model=model, train={**TRAIN, "steps": STEPS})
    receipt = grown(run, tmp_path / "more", method="expand")
    assert receipt.ok and receipt.optimizer.startswith("kept: moments of ") and "begin with" not in receipt.optimizer
    assert list(go_on(tmp_path / "more")) == list(range(STEPS + 1, 2 * STEPS + 1))


def test_without_a_state_there_is_nothing_to_keep(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, Wanted(output=tmp_path / "fresh", method="modality"))
    with pytest.raises(ConfigError, match=r"--optimizer keep: .*fresh holds weights and no state of an optimizer"):
        grown(tmp_path / "fresh", tmp_path / "out", method="expand")
    with pytest.raises(ConfigError, match="--optimizer keep has no meaning for --method branch"):
        upcycle([dense, dense], Wanted(output=tmp_path / "out", method="branch", optimizer="keep"))
    assert not (tmp_path / "out").exists()
