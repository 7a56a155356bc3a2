"""MIL-NCE: against loops in float64, as InfoNCE where no two samples are of one bag, on data, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moemm.config import load_config
from moemm.config.schema import ContrastiveConfig
from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.loader import train_loader
from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.errors import CheckpointError, ConfigError, DataError
from moemm.modalities import fit_modalities
from moemm.models import Model, build_model
from moemm.objectives import LabelFree, build_pretext
from moemm.objectives.contrastive import PairLoss
from moemm.testing.tiny import tiny_config
from moemm.train import train
from moemm.train.setup import prepare, train_values

NUM = 120
BAG = np.arange(NUM) * 7 % 40
"""Of each sample: 40 bags of three, none of neighbours."""
PROBLEM = "objectives.contrastive.loss: has no bags"


def same_of(bag_n: torch.Tensor) -> torch.Tensor:
    return bag_n[:, None] == bag_n


def cosines(seed: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.rand(n, n, generator=generator, dtype=torch.float64) - 1.0).requires_grad_()


def by_loops(cosine_nn: torch.Tensor, bag: list[int], temperature: float) -> list[torch.Tensor]:
    """-log( sum over positives / (sum over positives + sum over negatives) ), the mean of both directions."""
    found = []
    for i in range(len(bag)):
        parts = []
        for row in (cosine_nn[i], cosine_nn[:, i]):
            positives = sum(torch.exp(row[j] / temperature) for j in range(len(bag)) if bag[j] == bag[i])
            negatives = sum(torch.exp(row[j] / temperature) for j in range(len(bag)) if bag[j] != bag[i])
            parts.append(-torch.log(positives / (positives + negatives)))
        found.append((parts[0] + parts[1]) / 2)
    return found


@pytest.mark.parametrize("bag", [[0, 1, 0, 2, 2, 0, 3, 1], [5, 5, 5, 5, 5, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]])
def test_the_loss_is_that_of_loops(bag: list[int]) -> None:
    loss = PairLoss(ContrastiveConfig(loss="mil_nce", temperature=0.25))
    mine, theirs = cosines(0, 8), cosines(0, 8)
    (found_n,), _ = loss([mine], [same_of(torch.tensor(bag))])
    wanted_n = torch.stack(by_loops(theirs, bag, 1.0 / math.exp(loss.scale.item())))
    torch.testing.assert_close(found_n, wanted_n, rtol=1e-6, atol=1e-9)
    weight_n = torch.arange(1.0, 9.0)
    (found_n * weight_n).sum().backward()
    (wanted_n * weight_n).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_bags_of_one_are_infonce_to_the_bit() -> None:
    made = []
    for kind in ("infonce", "mil_nce"):
        loss, cosine_nn = PairLoss(ContrastiveConfig(loss=kind)), cosines(1, 9).detach().float().requires_grad_()  # type: ignore[arg-type]
        (found_n,), reach = loss([cosine_nn], [same_of(torch.arange(9))])
        (found_n.sum() + reach).backward()
        made.append((found_n, cosine_nn.grad, loss.scale.grad))
    assert all(torch.equal(one, two) for one, two in zip(*made, strict=True))


def test_a_bag_that_is_everything_has_no_loss_and_no_gradient() -> None:
    loss, cosine_nn = PairLoss(ContrastiveConfig(loss="mil_nce")), cosines(2, 5)
    (found_n,), reach = loss([cosine_nn], [same_of(torch.zeros(5))])
    (found_n.sum() + reach).backward()
    assert not found_n.any() and not cosine_nn.grad.any() and not loss.scale.grad.any()


def write_pairs(folder: Path, name: str = "pairs", **columns: Any) -> None:
    """`a` and `b` are noisy codes of the sample's bag; every fifth sample lacks `b`, every seventh `a`."""
    random = np.random.default_rng(0)
    code = random.normal(size=(40, 6))[BAG]
    values = {key: (code + 0.3 * random.normal(size=code.shape)).astype(np.float32) for key in ("a", "b")}
    lacking = {"a": np.arange(NUM) % 7 == 3, "b": np.arange(NUM) % 5 == 1}
    lacking["a"] &= ~lacking["b"]
    labels = {"label": LabelData(values=BAG % 2), "label_bag": LabelData(values=BAG)}
    labels["label_height"] = LabelData(values=code[:, 0].astype(np.float32))
    write_file(
        folder / f"{name}.h5", task=name, labels=labels, split=np.where(BAG < 30, 0, np.where(BAG < 35, 1, 2)),
        modalities={
            key: ModalityData(
                kind="timeseries", channels=list("uvwxyz"),
                values=[None if gone else row[None] for row, gone in zip(rows, lacking[key], strict=True)],
            )
            for key, rows in values.items()
        },
        **{"group": BAG - 20, **columns},
    )  # fmt: skip


def config_of(folder: Path, *, contrastive: dict[str, Any] | None = None, task: dict[str, Any] | None = None,
              tasks: list[dict[str, Any]] | None = None, **train_section: Any) -> Any:  # fmt: skip
    first = {"name": "pairs", "file": "pairs.h5", "bags": "group"} if task is None else task
    return tiny_config(
        folder,
        data={"tasks": tasks or [first]},
        modalities={name: {"patch": [1], "normalize": "none"} for name in "ab"},
        objectives={
            "supervised": {"weight": 0.0},
            "contrastive": {"weight": 1.0, "loss": "mil_nce", **(contrastive or {})},
        },
        train={"output": str(folder / "run"), "batch_size": 24, "steps": 8, "log_every": 1, **train_section},
    )


class Run:
    """A model of the pairs, and batches."""

    def __init__(self, folder: Path, **sections: Any):
        write_pairs(folder)
        self.config = config_of(folder, **sections).config
        self.catalogue = build_catalogue(self.config.data, base=folder)
        specs = fit_modalities(
            self.catalogue.modalities, self.config.modalities, lambda name: train_values(self.catalogue, name)
        )
        torch.manual_seed(0)
        self.model: Model = build_model(self.config.model, specs=specs, tasks=self.catalogue.tasks)
        tokenizers: dict[str, Any] = dict(self.model.tokenizers.items())
        self.pretext = build_pretext(self.config.objectives, tokenizers, self.catalogue.tasks, 16, seed=0)
        assert isinstance(self.pretext, LabelFree)
        self.model.pretext = self.pretext
        self.model.train()

    def batch(self, items: list[int], task: str = "pairs") -> PackedBatch:
        data = SplitDataset(self.catalogue, task=task, split="train")
        return Packer(self.catalogue)([data[item] for item in items])


def test_on_data_with_modalities_missing_it_is_that_of_loops(tmp_path: Path) -> None:
    run = Run(tmp_path)
    seen: dict[str, torch.Tensor] = {}
    projections: Any = run.pretext.objectives["contrastive"].project  # type: ignore[union-attr]
    for name, layer in projections.items():
        layer.register_forward_hook(lambda module, given, out, name=name: seen.__setitem__(name, out.detach().double()))
    batch = run.batch(list(range(50)))
    total, count = run.model(batch).pretext["contrastive"]
    rows = [i for i in range(50) if bool(batch.presence[i].all())]
    bag = [int(BAG[batch.index[i]]) for i in rows]
    z_a, z_b = (nn.functional.normalize(seen[name][rows], dim=-1) for name in "ab")
    wanted = sum(float(one) for one in by_loops(z_a @ z_b.T, bag, run.config.objectives.contrastive.temperature))
    assert 1 < len(set(bag)) < len(bag) == len(rows) < 50
    assert float(count) == len(rows) and total.item() == pytest.approx(wanted, rel=1e-5)


def test_samples_that_have_nothing_to_be_told_apart_from_do_not_count(tmp_path: Path) -> None:
    run = Run(tmp_path)
    data = SplitDataset(run.catalogue, task="pairs", split="train")
    own = [item for item in range(len(data)) if BAG[data.indices[item]] == BAG[0] and len(data[item].modalities) == 2]
    total, count = run.model(run.batch(own)).pretext["contrastive"]
    assert len(own) > 1 and float(total) == 0.0 and float(count) == 0.0
    total.backward()
    assert all(not p.grad.any() for name, p in run.model.named_parameters() if name.startswith("trunk") and
               p.grad is not None)  # fmt: skip


def test_a_sample_without_bags_is_its_own_and_files_do_not_share_bags(tmp_path: Path) -> None:
    write_pairs(tmp_path, "more")
    one = {"name": "pairs", "file": "pairs.h5", "bags": "group"}
    run = Run(tmp_path, tasks=[
        one, {**one, "name": "again", "bags": "label_bag"}, {**one, "name": "same", "label": "label_height"},
        {**one, "name": "more", "file": "more.h5"}, {**one, "name": "plain", "bags": None},
    ])  # fmt: skip
    bags = {name: run.batch(list(range(60)), name).bag for name in ("pairs", "again", "same", "more", "plain")}
    number = torch.from_numpy(BAG[SplitDataset(run.catalogue, task="pairs", split="train").indices[:60]])
    for name in ("pairs", "again", "same", "more"):
        assert torch.equal(same_of(bags[name]), same_of(number))
    assert torch.equal(bags["pairs"], bags["same"]), "one column of one file, whatever the label"
    assert len(bags["plain"].unique()) == 60
    others = [set(bags[name].tolist()) for name in ("pairs", "again", "more", "plain")]
    assert len(set.union(*others)) == sum(map(len, others))


@pytest.mark.parametrize("together", [None, 2, 1])
def test_samples_of_a_bag_meet_in_batches(tmp_path: Path, together: int | None) -> None:
    write_pairs(tmp_path)
    task = {"name": "pairs", "file": "pairs.h5", "bags": "group", **({"together": together} if together else {})}
    loaded = config_of(tmp_path, task=task)
    catalogue = build_catalogue(loaded.config.data, base=tmp_path)
    pairs, drawn = 0, []
    with train_loader(catalogue, loaded.config) as loader:
        for _, batch in zip(range(15), loader, strict=False):
            pairs += int(same_of(batch.bag).triu(1).sum())
            drawn += batch.index.tolist()
    assert sorted(set(drawn)) == sorted(drawn[:90]), "a pass over the 90 samples still draws each of them once"
    # 15 batches of 24: 120 bags of three, of which those at the edges of a batch or an epoch are cut.
    least, most = {None: (270, 400), 2: (110, 220), 1: (0, 110)}[together]
    assert least < pairs < most


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("noisy", ["ignore", "weigh"])
def test_it_trains_and_aligns(tmp_path: Path, noisy: str) -> None:
    write_pairs(tmp_path)
    loaded = config_of(tmp_path, contrastive={"noisy_pairs": noisy}, steps=60, lr=1e-2, log_every=20)
    summary = train(loaded)
    assert summary["steps"] == 60
    lines = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"objectives"' in line]
    first, last = (float(line.split('"contrastive": ')[1].split(",")[0].rstrip("}")) for line in (lines[0], lines[-1]))
    assert last < 0.7 * first


def test_large_bags_do_not_look_right_by_their_size(tmp_path: Path) -> None:
    """At chance, what `noisy_pairs` remembers does not tell the size of a bag."""
    run = Run(tmp_path)
    contrastive: Any = run.pretext.objectives["contrastive"]  # type: ignore[union-attr]
    bag_N = torch.cat([torch.arange(300), 300 + torch.arange(300) // 5])
    generator = torch.Generator().manual_seed(0)
    z_NMD = nn.functional.normalize(torch.randn(600, 2, 512, generator=generator), dim=-1)
    present_NM = torch.ones(600, 2, dtype=torch.bool)
    known: Any = type("Known", (), {"bag_N": bag_N, "present_NM": present_NM})
    found = contrastive._over_pairs(lambda pair: z_NMD, known)
    single, five = found.loss_NP[:300].mean(), found.loss_NP[300:].mean()
    assert float(single - five) > 1.4, "the loss itself does: log 5 is 1.6"
    told = found.told_NP[:, 0]
    assert torch.equal(told[:300], found.loss_NP[:300, 0].detach())
    assert abs(float(told[:300].mean() - told[300:].mean())) < 0.05


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"task": {"name": "pairs", "file": "pairs.h5"}}, ConfigError, PROBLEM),
        (
            {"contrastive": {"loss": "infonce"}},
            ConfigError,
            "data.tasks.0.bags: has no meaning without `objectives.contrastive` of loss mil_nce",
        ),
        ({"contrastive": {"weight": 0.0}}, ConfigError, "bags: has no meaning without|there is nothing to learn"),
        (
            {"task": {"name": "pairs", "file": "pairs.h5", "together": 3}},
            ConfigError,
            "data.tasks.0.together: has no meaning without `bags`",
        ),
        (
            {"task": {"name": "pairs", "file": "pairs.h5", "bags": "group", "together": 0}},
            ConfigError,
            "data.tasks.0.together: is out of range",
        ),
        (
            {"task": {"name": "pairs", "file": "pairs.h5", "bags": "label_clip"}},
            DataError,
            "no data set 'label_clip' of whole numbers",
        ),
        (
            {"task": {"name": "pairs", "file": "pairs.h5", "bags": "label_height"}},
            DataError,
            "allowed: group, label, label_bag",
        ),
    ],
)
def test_refused(tmp_path: Path, sections: dict[str, Any], error: type[Exception], message: str) -> None:
    write_pairs(tmp_path)
    with pytest.raises(error, match=message):
        build_catalogue(config_of(tmp_path, **sections).config.data, base=tmp_path)


def test_a_file_without_group_says_what_it_has(tmp_path: Path) -> None:
    write_pairs(tmp_path, group=None)
    with pytest.raises(DataError, match=r"no data set 'group' of whole numbers.*\n  allowed: label, label_bag"):
        build_catalogue(config_of(tmp_path).config.data, base=tmp_path)


@pytest.mark.usefixtures("alone")
def test_a_resume_may_not_change_the_bags(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    train(config_of(tmp_path, steps=2))
    path = tmp_path / "tiny.yaml"
    assert prepare(load_config(path), resume=True)[1], "as it was"
    path.write_text(path.read_text().replace("bags: group", "bags: label_bag"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="bags"):
        prepare(load_config(path), resume=True)
