"""`harmonize.at: trunk` against plain PyTorch: a gradient of each loss by itself, the Gram matrix by loops."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moemm.config import load_config
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.distributed import connect
from moemm.errors import ConfigError, HealthError
from moemm.harmonize import HARMONIZERS, Context, Settler, register_harmonizer, weights
from moemm.modalities import prepare_functions
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train
from moemm.train.callbacks import Callback
from moemm.train.harmonizing import build_fork, draw_number, report
from moemm.train.setup import prepare
from moemm.train.signals import StopRequest
from moemm.train.trainer import Trainer
from moemm.train.trunk import TrunkGradients

pytestmark = pytest.mark.usefixtures("alone")

METHODS = sorted(set(HARMONIZERS) - {"sum"})
GAMMA = 0.03
OBJECTIVES = {
    "supervised": {"weight": 1.0},
    "masked": {"weight": 1.0, "ratio": 0.5},
    "contrastive": {"weight": 10.0},
    "similarity": {"weight": 3.0},
}
LOSSES = ("shapes", "tones", "masked", "contrastive", "similarity")


class Run:
    """A trainer that hands its gradients over instead of applying them, and what plain PyTorch makes of its model."""

    def __init__(self, folder: Path, accumulation: int, **sections: Any) -> None:
        loaded = tiny_config(
            folder,
            **{"objectives": OBJECTIVES, "model": {"dropout": 0.1}, **sections},
            train={"output": str(folder / f"run_{accumulation}"), "batch_size": 16, "accumulation": accumulation},
            harmonize={"method": "upgrad", "at": "trunk", "gamma": 0.0},
        )
        setup, _ = prepare(loaded, resume=False)
        self.trainer, self.accumulation = Trainer(setup, connect(timeout_s=60), [], StopRequest()), accumulation
        self.model = self.trainer.engine.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        sets = [SplitDataset(setup.catalogue, task=task.name, split="train") for task in setup.catalogue.tasks]
        pack, share = Packer(setup.catalogue, prepare_functions(setup.specs)), 8 // accumulation
        self.batches = [
            pack([one[number * share + i] for one in sets for i in range(share)]) for number in range(accumulation)
        ]
        self.apply, self.trainer.engine.step = self.trainer.engine.step, self._hand_over  # type: ignore[method-assign]

    def _hand_over(self, *, lr: float) -> None:
        if not self.trainer.engine.deepspeed.is_gradient_accumulation_boundary():
            self.apply(lr=lr)
            return
        self.given = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        self.model.zero_grad()

    def settled(self, method: str) -> torch.Tensor:
        """The gradient that the engine is given."""
        self.trainer._settler = Settler(method, LOSSES)
        self.trainer.config.harmonize.gamma, self.trainer.step = GAMMA, 0
        torch.manual_seed(3)
        self.trainer._one_step(iter(self.batches))
        return self.given

    def explicit(self) -> list[list[torch.Tensor]]:
        """Of each loss, then of the rest, the gradient of every parameter, by passes of their own."""
        found = []
        for number in range(len(LOSSES) + 1):
            torch.manual_seed(3)
            total = [torch.zeros_like(parameter) for parameter in self.parameters]
            for batch in self.batches:
                output = self.model(batch)
                losses = [nn.functional.cross_entropy(output.outputs[t], batch.targets[t], reduction="sum")
                          for t in LOSSES[:2]]  # fmt: skip
                losses += [OBJECTIVES[name]["weight"] * output.pretext[name][0] for name in LOSSES[2:]]
                whole = self.trainer._objective(output, batch).backward / self.accumulation
                losses = [loss / 16 for loss in losses]
                chosen = losses[number] if number < len(LOSSES) else whole - torch.stack(losses).sum()
                parts = torch.autograd.grad(chosen, self.parameters, allow_unused=True)
                total = [a if b is None else a + b for a, b in zip(total, parts, strict=True)]
            found.append(total)
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, tuple[Run, list[list[torch.Tensor]]]]]:
    folder, made = tmp_path_factory.mktemp("trunk"), {}
    for accumulation in (1, 4):
        run = Run(folder, accumulation)
        made[accumulation] = (run, run.explicit())
    yield made
    for run, _ in made.values():
        run.trainer.close()


def weighed(gradients: list[list[torch.Tensor]], method: str) -> torch.Tensor:
    """By the definition."""
    *losses, rest = gradients
    num = range(len(losses))
    shared = [sum(bool(loss[p].any()) for loss in losses) > 1 for p in range(len(rest))]
    assert 0 < sum(shared) < len(shared)
    gram = torch.zeros(len(losses), len(losses), dtype=torch.float64)
    for i in num:
        for j in num:
            for p, counts in enumerate(shared):
                if counts:
                    gram[i, j] += (losses[i][p].double() * losses[j][p].double()).sum()
    context = Context(gamma=GAMMA, generator=torch.Generator().manual_seed(draw_number(0, 0, 0)))
    w = weights(gram, method, context).w.tolist()
    total = []
    for p, counts in enumerate(shared):
        parts = [(w[i] if counts else 1.0) * losses[i][p] for i in num]
        total.append((torch.stack(parts).sum(0) + rest[p]).flatten())
    return torch.cat(total)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_that_of_explicit_gradients(runs: Any, method: str, accumulation: int) -> None:
    run, gradients = runs[accumulation]
    found, wanted = run.settled(method), weighed(gradients, method)
    plain = torch.cat([torch.stack(parts).sum(0).flatten() for parts in zip(*gradients, strict=True)])
    error = ((found - wanted).norm() / wanted.norm()).item()
    change = ((found - plain).norm() / plain.norm()).item()
    assert error < 5e-6, f"{error:.1e}"
    assert change > 1e-2, f"only {change:.1e} from the plain sum"


@pytest.mark.parametrize("way", ["trunk", "sample"])
def test_accumulation_does_not_change_it(tmp_path: Path, way: str) -> None:
    found = []
    for accumulation in (1, 4):  # losses of a micro-batch as a whole, contrastive and the router's, are left out
        objectives = {**OBJECTIVES, "contrastive": {"weight": 0.0}}
        run = Run(tmp_path, accumulation, objectives=objectives, model={"moe": "dense"})
        if way == "sample":
            run.trainer.config.harmonize.at, run.trainer._settler = "fork", None
            run.trainer._fork = run.model.fork = build_fork(run.trainer.config, run.model)
        run.trainer._one_step(iter(run.batches))
        found.append(run.given)
        run.trainer.close()
    assert (found[0] - found[1]).norm() / found[0].norm() < 5e-6


def test_activation_checkpointing_does_not_change_it(tmp_path: Path) -> None:
    found = []
    for recompute in (False, True):
        run = Run(tmp_path, 1)
        run.model.trunk.recompute = recompute
        found.append(run.settled("upgrad"))
        run.trainer.close()
    assert (found[0] - found[1]).norm() / found[0].norm() < 5e-6


def hand_made() -> TrunkGradients:
    """Three losses and the rest; the first two share x, the first two and the third y, the last alone has z."""
    made, tensor = TrunkGradients(shares=False), torch.tensor
    none = torch.zeros(2)
    made.add(0, [tensor([1.0, 0.0]), tensor([1.0, 1.0]), none])
    made.add(1, [tensor([-1.0, 1.0]), tensor([0.0, 2.0]), none])
    made.add(2, [none, tensor([1.0, 0.0]), tensor([5.0, 5.0])])
    made.add(3, [none, tensor([0.5, 0.5]), none])
    return made


def test_what_one_loss_alone_reaches_takes_no_part() -> None:
    made = hand_made()
    assert made.shared() == [True, True, False]
    wanted = torch.tensor([[3.0, 1.0, 1.0], [1.0, 6.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(made.gram(made.shared()), wanted)
    settled, finite = made.settled(Settler("mgda", ["a", "b", "c"]))
    w = weights(wanted, "mgda").w
    assert finite and torch.equal(settled[2], torch.tensor([5.0, 5.0])), "its own gradient, unweighed"
    torch.testing.assert_close(settled[0], torch.tensor([w[0] - w[1], w[1]]).float())
    torch.testing.assert_close(settled[1], torch.tensor([w[0] + w[2] + 0.5, w[0] + 2 * w[1] + 0.5]).float())


def test_long_parameters_are_multiplied_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = hand_made().gram([True] * 3)
    monkeypatch.setattr("moemm.train.trunk.CHUNK", 1)
    assert torch.equal(hand_made().gram([True] * 3), wanted)


def test_an_absent_loss_has_no_say() -> None:
    made, without = hand_made(), hand_made()
    made.parts.insert(2, [None] * 3)
    settler = Settler("imtl_g", ["a", "b", "absent", "c"])
    one, two = made.settled(settler)[0], without.settled(Settler("imtl_g", ["a", "b", "c"]))[0]
    assert all(map(torch.equal, one, two))
    told = report(settler, 1)
    assert told is not None and set(told.pairs) == {"a | b", "a | c"}, "b and c have nothing in common"
    assert hand_made().num_bytes == 7 * 2 * 4, "zeros are not held"


@pytest.fixture
def config(tiny_data: Path, tmp_path: Path) -> Any:
    def make(output: str, **sections: Any) -> Any:
        options = {"output": str(tmp_path / output), "steps": 3, "lr": 1e-2, "baselines": False}
        own = tmp_path / f"{output}.yaml"
        loaded = tiny_config(
            tiny_data, **{"objectives": OBJECTIVES, **sections, "train": {**options, **sections.get("train", {})}}
        )
        own.write_text(loaded.path.read_text())
        return load_config(own)

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] in ("train", "routing")]


TRUNK = {"method": "upgrad", "at": "trunk"}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_batch_counts_once(config: Any, tmp_path: Path, stage: int) -> None:
    sections = {"model": {"dropout": 0.1, "router": {"bias_rate": 0.01}}, "deepspeed": {"zero_stage": stage}}
    train(config("plain", train={"accumulation": 2}, **sections))
    train(config("trunk", train={"accumulation": 2}, harmonize=TRUNK, **sections))
    plain, trunk = lines(tmp_path / "plain"), lines(tmp_path / "trunk")
    told = trunk[0].pop("conflict")
    assert "shapes | tones" in told and "masked | contrastive" in told
    assert all(-1.0 <= cos <= 1.0 and share in (0.0, 1.0) for cos, share in told.values())
    times = {"tokens_per_second", "seconds", "seconds_left", "grad_norm", "conflict"}
    first, second = ({k: v for k, v in one.items() if k not in times} for one in (plain[0], trunk[0]))
    assert first == second and plain[1] == trunk[1], "losses, accuracy and routing of the first step"
    assert trunk[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    assert trunk[-2]["loss"] != pytest.approx(plain[-2]["loss"], rel=1e-6)


def test_the_sum_at_the_trunk_trains_as_the_plain_sum(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moemm.harmonize.registry.HARMONIZERS", dict(HARMONIZERS))

    @register_harmonizer("ones", keeps=("seen",))
    def ones(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
        context.state["seen"] += 1.0
        return gram_XTT.new_ones(gram_XTT.shape[:2])

    model = {"dropout": 0.1}
    train(config("plain", model=model))
    train(config("trunk", model=model, harmonize={"method": "ones", "at": "trunk"}))
    plain, trunk = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("plain", "trunk"))
    assert trunk == pytest.approx(plain, rel=1e-6)
    assert load_run(tmp_path / "trunk").model.settler.kept.seen.max() == 3.0, "its state is in the checkpoint"


def test_resume_is_bit_equal(config: Any, tmp_path: Path) -> None:
    sections = {"harmonize": {"method": "gradvac", "at": "trunk"}, "model": {"dropout": 0.1}}
    train(config("whole", train={"steps": 4}, **sections))
    train(config("parts", train={"steps": 4, "checkpoint": {"every": 2}}, **sections), extra_callbacks=[Stop()])
    train(config("parts", train={"steps": 4, "checkpoint": {"every": 2}}, **sections), resume=True)
    whole, parts = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert whole["settler.kept.cosine"].any()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


class Stop(Callback):
    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("scale", ["uncertainty", "famo"])
def test_losses_may_be_scaled_too(config: Any, tmp_path: Path, scale: str) -> None:
    harmonize, found = {**TRUNK, "scale": scale}, []
    for stage in (0, 3):  # with one pass forward for all losses, and with one for each
        train(config(f"{stage}", deepspeed={"zero_stage": stage}, harmonize=harmonize, train={"accumulation": 2}))
        found.append([[line["loss"], line["loss_weights"]] for line in lines(tmp_path / f"{stage}") if "loss" in line])
    assert [one for one, _ in found[1]] == pytest.approx([one for one, _ in found[0]], rel=1e-5)
    for (_, one), (_, two) in zip(*found, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert found[0][0][1] != pytest.approx(found[0][-1][1], rel=1e-4), "weights must move for this to mean anything"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_runs(config: Any, tmp_path: Path, stage: int) -> None:
    accumulated, zero = {"accumulation": 2}, {"zero_stage": stage}
    train(config("bf16", train={"precision": "bf16", **accumulated}, deepspeed=zero, harmonize=TRUNK))
    train(config("fp32", train=accumulated, deepspeed=zero, harmonize=TRUNK))
    low, full = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("bf16", "fp32"))
    assert low == pytest.approx(full, rel=2e-2) and low != full


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_is_not_applied(config: Any, tmp_path: Path, stage: int) -> None:
    class Explode(Callback):
        def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
            if trainer.step == 2:
                first = next(p for name, p in trainer.engine.model.named_parameters() if name.startswith("trunk"))
                first.register_hook(lambda gradient: gradient * math.inf)

    strict = {"checkpoint": {"every": 1}, "health": {"max_faulty": 1}}
    loaded = config("run", train=strict, harmonize=TRUNK, deepspeed={"zero_stage": stage})
    with pytest.raises(HealthError, match="gradient of step 3 has the norm nan"):
        train(loaded, extra_callbacks=[Explode()])
    assert all(torch.isfinite(value).all() for value in load_run(tmp_path / "run").model.state_dict().values())


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ONE = {"objectives": {"supervised": {"weight": 0.0}, "contrastive": {"weight": 1.0}}}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"harmonize": {**TRUNK, "per": "sample"}}, "harmonize.per: is for `harmonize.at: fork`"),
        ({"harmonize": {**TRUNK, "per": "modality"}}, "harmonize.per: is for `harmonize.at: fork`"),
        ({"harmonize": {"at": "trunk"}}, "harmonize.at: has no meaning with `harmonize.method: sum`"),
        ({"harmonize": {**TRUNK, "at": "heads"}}, "harmonize.at"),
        (
            {"harmonize": TRUNK, "deepspeed": {"extra": {"data_types": {"grad_accum_dtype": "fp32"}}}},
            "deepspeed.extra.data_types: keeps gradients where `harmonize.at: trunk` cannot",
        ),
        (
            {
                "harmonize": TRUNK,
                "deepspeed": {
                    "zero_stage": 2,
                    "extra": {"zero_optimization": OFFLOAD},
                },
            },
            "deepspeed.extra.zero_optimization.offload_optimizer: keeps gradients",
        ),
        ({"harmonize": TRUNK, **ONE}, "at the trunk, but this run has one loss alone\n  given: contrastive\n"),
        ({"harmonize": {**TRUNK, "method": "upgrd"}}, "no harmonizer 'upgrd'"),
        ({"harmonize": {**TRUNK, "scale": "gradnorm"}}, "harmonize.scale: looks at gradients at the fork"),
    ],
)
def test_refused(config: Any, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(config("refused", **sections))


def test_every_block_may_predict_at_the_trunk(config: Any) -> None:
    sections = {"objectives": {}, "model": {"predict_every_block": True}}
    assert train(config("blocks", harmonize=TRUNK, **sections))["steps"] == 3
    with pytest.raises(ConfigError, match="predict_every_block: brings losses to every block; the fork sees"):
        config("fork", harmonize={"method": "upgrad"}, **sections)
