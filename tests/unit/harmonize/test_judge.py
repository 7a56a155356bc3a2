"""Dropping before the heads: which samples agree, and that those that do not are left out of the heads, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moemm.config import Config, load_config
from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.data.writer import ModalityData, write_file
from moemm.harmonize import Fork
from moemm.modalities import fit_modalities, prepare_functions
from moemm.models import Model, build_model
from moemm.objectives import build_pretext
from moemm.train.harmonizing import build_fork, report
from moemm.train.setup import train_values
from tests.unit.harmonize.test_fork import Leaves

GAMMA = 0.02


class Triplets:
    """Samples of three modalities, some of two; pairs a+b and a+c."""

    def __init__(self, folder: Path, method: str):
        draw = np.random.default_rng(0)
        values = {name: list(draw.normal(size=(40, 5, 3)).astype(np.float32)) for name in "abc"}
        values["c"][3:40:4] = [None] * len(values["c"][3:40:4])
        write_file(
            folder / "t.h5",
            task="t",
            labels=np.arange(40) % 2,
            split=np.repeat([0, 1, 2], [24, 8, 8]),
            modalities={k: ModalityData(kind="timeseries", values=v, ragged=True) for k, v in values.items()},
        )
        sections = {
            "data": {"root": str(folder), "num_workers": 0, "tasks": [{"name": "t", "file": "t.h5"}]},
            "model": {"dim": 16, "layers": 1, "heads": 2, "dropout": 0.0, "moe": "dense"},
            "objectives": {"contrastive": {"weight": 1.0, "pairs": [["a", "b"], ["a", "c"]]}},
            "harmonize": {"method": method, "gamma": GAMMA},
            "train": {"output": str(folder / "run"), "steps": 1, "batch_size": 16},
        }
        (folder / "t.yaml").write_text(yaml.safe_dump(sections), encoding="utf-8")
        self.config: Config = load_config(folder / "t.yaml").config
        catalogue = build_catalogue(self.config.data, base=folder)
        specs = fit_modalities(catalogue.modalities, {}, lambda name: train_values(catalogue, name))
        torch.manual_seed(0)
        self.model: Model = build_model(self.config.model, specs=specs, tasks=catalogue.tasks)
        tokenizers: dict[str, Any] = dict(self.model.tokenizers.items())
        self.model.pretext = build_pretext(self.config.objectives, tokenizers, catalogue.tasks, 16, seed=0)
        self.model.double().train()
        dataset = SplitDataset(catalogue, task="t", split="train")
        self.batch = Packer(catalogue, prepare_functions(specs))([dataset[i] for i in range(16)])
        self.fork = build_fork(self.config, self.model)
        assert self.fork is not None
        self.fork.begin(0, gamma=GAMMA)

    def backward(self, fork: Any) -> dict[str, torch.Tensor]:
        """Gradients of every parameter, of the contrastive loss alone."""
        self.model.fork = fork
        self.model.zero_grad()
        output = self.model(self.batch)
        output.pretext["contrastive"][0].backward()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def agreeing(self) -> torch.Tensor:
        """(16,) by loops: which samples' two gradients have a cosine of at least gamma."""
        leaves = Leaves()
        self.backward(leaves)
        z = {0: torch.zeros_like(leaves.x_TD), 1: torch.zeros_like(leaves.x_TD)}
        names = self.model.pretext.losses  # type: ignore[union-attr]
        first = 1  # the task's loss
        for leaf, loss_T in zip(leaves.leaves, leaves.readers.loss_BT, strict=True):
            for number in range(len(names)):
                own = loss_T == first + number
                if leaf.grad is not None:
                    z[number][own] += leaf.grad[own]
        keep = torch.ones(16)
        for sample in range(16):
            own = leaves.readers.sample_T == sample
            u, v = z[0][own].flatten(), z[1][own].flatten()
            if u.norm() > 0 and v.norm() > 0 and u @ v / (u.norm() * v.norm()) < GAMMA:
                keep[sample] = 0.0
        return keep


@pytest.fixture
def made(tmp_path: Path) -> Any:
    return lambda method="curriculum": Triplets(tmp_path, method)


def test_samples_that_disagree_are_left_out_of_the_heads_too(made: Any) -> None:
    run = made()
    keep_B = run.agreeing()
    assert 0 < keep_B.sum() < 16 and keep_B[3] == 1.0, "some of each; a sample of one pair cannot disagree"
    found = run.backward(run.fork)
    pretext, passed = run.model.pretext, run.model.pretext.forward
    pretext.forward = lambda branches, views, **_: passed(branches, views, keep_B=keep_B)
    wanted = run.backward(None)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
    pretext.forward = passed
    plain = run.backward(None)
    heads = [name for name in plain if "contrastive.project." in name]
    assert heads and any((found[name] - plain[name]).norm() > 1e-2 * plain[name].norm() for name in heads)


def test_what_was_left_out_is_told(made: Any) -> None:
    run = made()
    keep_B = run.agreeing()
    run.fork.begin(0, gamma=GAMMA)
    run.backward(run.fork)
    told = report(run.fork, 1)
    assert told is not None and told.dropped == pytest.approx(float((1 - keep_B).sum()) / 12)
    assert report(run.fork, 1) is None, "taken"


def test_what_is_kept_and_still_conflicts_is_realigned_in_the_trunk(made: Any) -> None:
    found = {}
    for method in ("curriculum", "realign_curriculum"):
        run = made(method)
        run.fork.begin(0, gamma=-0.05)
        found[method] = run.backward(run.fork)
    kept, realigned = found.values()
    for name, gradient in kept.items():
        if "contrastive.project." in name:
            torch.testing.assert_close(realigned[name], gradient, rtol=1e-5, atol=1e-9, msg=name)
    trunk = [name for name in kept if name.startswith("trunk")]
    assert any((kept[name] - realigned[name]).norm() > 1e-3 * kept[name].norm() for name in trunk)


@pytest.mark.parametrize("per", ["token", "modality", "batch"])
def test_only_whole_samples_are_left_out_before_the_heads(per: str) -> None:
    fork = Fork("curriculum", ["a", "b"], per=per, reduce=lambda tensor: tensor)
    assert not fork.drops and Fork("curriculum", ["a", "b"], reduce=lambda tensor: tensor).drops
    assert not Fork("upgrad", ["a", "b"], reduce=lambda tensor: tensor).drops


def test_nothing_reaches_trunk_or_heads_by_judging(made: Any) -> None:
    run = made()
    run.backward(run.fork)
    before = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.fork.begin(0, gamma=GAMMA)
    run.model(run.batch)  # judges; no backward pass
    assert all(torch.equal(p.grad, before[name]) for name, p in run.model.named_parameters() if p.grad is not None)
