"""Pairs of modalities that look wrong: two groups of losses, running estimates, and what they do to the objective."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moemm.config import load_config
from moemm.data.writer import ModalityData, write_file
from moemm.errors import ConfigError
from moemm.objectives.noise import APART, LEAST, PairNoise, two_groups
from moemm.observe.sections import noise_section
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train
from tests.unit.objectives.test_objectives import Tiny, objectives


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_two_groups_are_told_apart(share: float) -> None:
    wrong_R = torch.arange(1000) < 1000 * share
    value_R = 0.5 * normal(0, 1000) + 4.0 * wrong_R
    right_R, apart = two_groups(value_R)
    assert float(apart) == pytest.approx(2**0.5 * 4.0 / (2 * 0.25) ** 0.5, rel=0.1)
    assert float(((right_R < 0.5) == wrong_R).float().mean()) > 0.995
    order_R = value_R.argsort()
    assert (right_R[order_R].diff() <= 1e-6).all(), "the higher the loss, the less likely is the pair right"
    again_R, _ = two_groups(100.0 * value_R - 7.0)
    torch.testing.assert_close(again_R, right_R, rtol=0, atol=1e-4)


@pytest.mark.parametrize("number", [LEAST, 1000, 5000])
@pytest.mark.parametrize("kind", ["normal", "skewed", "constant"])
def test_one_group_is_not_cut_in_two(kind: str, number: int) -> None:
    cut = 0
    for seed in range(20):
        drawn_R = normal(seed, number)
        value_R = {"normal": drawn_R, "skewed": torch.nn.functional.softplus(drawn_R), "constant": 0.0 * drawn_R}[kind]
        cut += int(float(two_groups(value_R)[1]) > APART)
    assert cut <= 1, f"{cut} of 20"


def test_a_running_loss_counts_a_micro_batch_once_and_forgets_what_it_began_with() -> None:
    noise, row_N = PairNoise([10], 1, start=0.0), torch.tensor([3, 7])
    noise.see(row_N, torch.tensor([[1.0], [3.0]]))
    noise.see(row_N, torch.tensor([[1.0], [3.0]]))  # a second pass of the same step
    noise.keep()
    noise.keep()
    assert noise.loss_RP[row_N, 0].tolist() == [-1.0, 1.0], "less the mean of the batch"
    noise.see(row_N, torch.tensor([[5.0], [1.0]]))
    noise.keep()
    assert noise.loss_RP[row_N, 0].tolist() == [0.5, -0.5]
    assert noise.seen_RP.sum() == 2 and noise.loss_RP[noise.seen_RP[:, 0] == 0].abs().sum() == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_not_remembered(value: float) -> None:
    noise, row_N = PairNoise([4], 2, start=0.0), torch.tensor([0, 1])
    noise.see(row_N, torch.tensor([[1.0, value], [2.0, 2.0]]))
    noise.keep()
    assert torch.isfinite(noise.loss_RP).all() and noise.seen_RP[:2].tolist() == [[True, False], [True, True]]


def estimated(*, start: float, wrong: int = 90, total: int = 300) -> PairNoise:
    """Of two pairs: the first has losses of two groups, the second of one."""
    noise = PairNoise([0, total, 5], 2, start=start)
    row_N = noise.rows(torch.ones(total, dtype=torch.int64), torch.arange(total))
    loss_NP = 0.2 * normal(2, total, 2) + 5.0
    loss_NP[:wrong, 0] += 3.0
    noise.see(row_N, loss_NP)
    noise.keep()
    noise.advance(1, 10)
    return noise


def test_weights_follow_the_estimates_from_the_start_on() -> None:
    noise = estimated(start=0.3)
    row_N = torch.arange(300)
    noise.progress = 0.29
    assert torch.equal(noise.weights(row_N), torch.ones(300, 2))
    noise.progress = 0.3
    found_NP = noise.weights(row_N)
    assert found_NP[:90, 0].max() < 0.01 and found_NP[90:, 0].min() > 0.99
    assert torch.equal(found_NP[:, 1], torch.ones(300)), "one group: every pair counts"
    assert noise.shares() == pytest.approx([0.3, 0.0])


def test_the_worst_samples_are_named() -> None:
    noise = estimated(start=1.0)
    found = noise.suspects(0, most=120)
    assert set(found.task) == {1} and set(found.place[:90]) == set(range(90)) and len(found.place) == 120
    assert found.seen == 300 and found.apart > APART and min(found.wrong[:90]) > 0.99 > 0.01 > max(found.wrong[90:])
    assert found.loss == sorted(found.loss, reverse=True)


def test_few_samples_are_not_judged() -> None:
    noise = estimated(start=0.0, wrong=10, total=LEAST - 1)
    assert noise.shares() == [0.0, 0.0] and float(noise.apart_P.max()) == 0.0


def test_a_pair_counts_as_much_as_it_is_likely_right(tmp_path: Path) -> None:
    made = Tiny(tmp_path, objectives("contrastive", supervised=0.0))
    noise, batch = made.pretext.noise, made.batch("shapes", "tones")  # type: ignore[union-attr]
    assert noise is not None
    noise.progress = 1.0

    def passed() -> tuple[torch.Tensor, torch.Tensor]:
        made.model.zero_grad()
        loss, count = made.model(batch).pretext["contrastive"]
        loss.backward()
        own = [p.grad for name, p in made.model.named_parameters() if name.startswith("trunk") and p.grad is not None]
        return torch.stack([loss.detach(), count]), torch.cat([one.flatten() for one in own])

    (whole, count), plain = passed()
    noise.right_RP[:] = 0.25
    (part, quarter), less = passed()
    assert float(part) == pytest.approx(float(whole) / 4) and float(quarter) == pytest.approx(float(count) / 4)
    torch.testing.assert_close(less, plain / 4)
    noise.right_RP[:] = 0.0
    (nothing, none), zero = passed()
    assert float(nothing) == 0.0 and float(none) == 0.0 and not zero.any(), "zeros, not a missing gradient"


@pytest.mark.parametrize("way", ["ignore", "estimate"])
def test_only_weigh_weighs(tmp_path: Path, way: Any) -> None:
    made = Tiny(tmp_path, objectives("contrastive", contrastive={"noisy_pairs": way}))
    noise = made.pretext.noise  # type: ignore[union-attr]
    if way == "ignore":
        assert noise is None
        return
    noise.right_RP[:], noise.progress = 0.0, 0.999
    present_BM = made.content(made.batch("shapes")).present_BM
    assert float(made.model(made.batch("shapes")).pretext["contrastive"][1]) == float((present_BM.sum(1) > 1).sum()) > 0


def test_a_key_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"noisy_from: has no meaning with `noisy_pairs: estimate`"):
        tiny_config(tmp_path, objectives={"contrastive": {"weight": 1.0, "noisy_pairs": "estimate", "noisy_from": 0.5}})


@pytest.mark.usefixtures("alone")
def test_planted_wrong_pairs_are_found_and_told(tmp_path: Path) -> None:
    """Two vectors that are the same code, but for the first 100 pairs; a run lists those."""
    code = normal(3, 340, 6).numpy()
    other = code[[(row + 1) % 100 if row < 100 else row for row in range(340)]]
    split = [0] * 300 + [1] * 20 + [2] * 20
    write_file(
        tmp_path / "pairs.h5",
        task="pairs",
        labels=torch.arange(340).remainder(2).numpy(),
        split=torch.tensor(split).numpy(),
        modalities={
            "a": ModalityData(kind="timeseries", values=code[:, None, :], channels=[str(i) for i in range(6)]),
            "b": ModalityData(kind="timeseries", values=other[:, None, :], channels=[str(i) for i in range(6)]),
        },
    )
    values = """
data: {root: FOLDER, num_workers: 0, tasks: [{name: pairs, file: pairs.h5}]}
modalities: {a: {patch: [1], normalize: none}, b: {patch: [1], normalize: none}}
model: {dim: 32, layers: 1, heads: 2, dropout: 0.0, moe: dense}
objectives: {supervised: {weight: 0.0}, contrastive: {weight: 1.0}}
train: {output: FOLDER/run, steps: 150, batch_size: 64, lr: 1.0e-2, baselines: false, log_every: 50}
"""
    (tmp_path / "pairs.yaml").write_text(values.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    summary = train(load_config(tmp_path / "pairs.yaml"))
    (found,) = summary["noisy_pairs"]
    named = {one["index"] for one in found["samples"] if one["wrong"] > 0.5}
    assert found["pair"] == "a+b" and found["seen"] == 300 and found["apart"] > APART
    assert found["share"] == pytest.approx(0.33, abs=0.08) and len(named & set(range(100))) > 0.9 * len(named) > 30
    page = noise_section(summary["noisy_pairs"])
    worst = found["samples"][0]
    assert f"{worst['index']}" in page.body and f"{found['share']:.0%}" in page.body
    noise: Any = load_run(tmp_path / "run").model.pretext.noise  # type: ignore[union-attr]
    loss_R = noise.loss_RP[:300, 0]
    better = (loss_R[:100, None] > loss_R[None, 100:]).float().mean()
    assert float(better) > 0.95, f"area under the ROC curve {float(better):.3f}"
