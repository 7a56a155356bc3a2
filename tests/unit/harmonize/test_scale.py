"""Weights by the values of losses over time, against the papers' formulas written out as plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_fork import Run
from torch.nn import functional as F

from moemm.config.schema import HarmonizeConfig
from moemm.distributed import World
from moemm.errors import ConfigError
from moemm.harmonize import SCALES, GradNorm, LossScale
from moemm.testing.tiny import tiny_config
from moemm.train.harmonizing import build_fork, build_scale
from moemm.train.step import Objective

EVERY = pytest.mark.parametrize("kind", list(SCALES))
NAMES = ("a", "b", "c")


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def make(
    kind: str, names: tuple[str, ...] = NAMES, reduce: Callable[[torch.Tensor], torch.Tensor] = same, **options: Any
) -> LossScale:
    return SCALES[kind](names, HarmonizeConfig(scale=kind, **options), reduce=reduce)  # type: ignore[arg-type]


def given(*means: float | None, samples: float = 4.0) -> torch.Tensor:
    """(2, L) sums and numbers of samples; None for a loss without samples."""
    sums = [0.0 if mean is None else mean * samples for mean in means]
    return torch.tensor([sums, [0.0 if mean is None else samples for mean in means]], dtype=torch.float64)


def one(scale: LossScale, sums_2L: torch.Tensor, lengths: list[float] | None = None) -> list[float]:
    """The weights of a step of one micro-batch; lengths: of the losses' gradients, as they are without weights."""
    own_L = torch.ones(len(scale.losses))
    w_L, term = scale.weigh(sums_2L, own_L, scale())
    if isinstance(scale, GradNorm) and lengths is not None:
        z_1LL = torch.diag(w_L * torch.tensor(lengths))[None]
        numbers_L = torch.arange(len(lengths))
        scale.watch(z_1LL, numbers_L[None], numbers_L)
    if term.requires_grad:
        term.backward()
    scale.step()
    return w_L.tolist()


RANDOM = torch.Generator().manual_seed(3)
COURSE = [[(1.0 + step) ** -slope * (0.9 + 0.2 * torch.rand((), generator=RANDOM).item()) * size
           for slope, size in ((0.1, 5.0), (0.5, 1.0), (1.0, 0.2))] for step in range(40)]  # fmt: skip
"""Means of three losses of different size that fall at different rates."""


def normalised(raw: list[float]) -> list[float]:
    return [len(raw) * value / sum(raw) for value in raw]


def test_uncertainty_is_what_the_formula_gives() -> None:
    scale, rate, log_variance = make("uncertainty"), 0.05, [0.0] * 3
    for means in COURSE:
        found = one(scale, given(*means))
        assert found == pytest.approx(normalised([math.exp(-s) for s in log_variance]), rel=1e-5)
        slope = [0.5 * (1.0 - math.exp(-s) * mean) for s, mean in zip(log_variance, means, strict=True)]
        (parameter,) = scale.parameters()
        assert parameter.grad is not None and parameter.grad.tolist() == pytest.approx(slope, rel=1e-4, abs=1e-6)
        log_variance = [s - rate * one for s, one in zip(log_variance, slope, strict=True)]
        with torch.no_grad():
            parameter -= rate * parameter.grad
        parameter.grad = None


def test_uncertainty_comes_to_rest_where_the_variance_is_the_loss() -> None:
    scale = make("uncertainty", names=("a", "b"))
    optimizer = torch.optim.AdamW(scale.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(800):
        found = one(scale, given(8.0, 0.5))
        optimizer.step()
        optimizer.zero_grad()
    assert scale().exp().tolist() == pytest.approx([8.0, 0.5], rel=1e-2)  # type: ignore[union-attr]
    assert found == pytest.approx(normalised([1 / 8, 2.0]), rel=1e-2)


def test_the_learned_part_adds_a_gradient_and_no_value() -> None:
    scale = make("uncertainty")
    _, term = scale.weigh(given(3.0, 2.0, 1.0), torch.ones(3), scale())
    assert term.item() == 0.0 and term.requires_grad
    assert not make("dwa").weigh(given(3.0, 2.0, 1.0), torch.ones(3), None)[1].requires_grad


@pytest.mark.parametrize("window", [1, 3])
def test_dwa_is_what_the_formula_gives(window: int) -> None:
    scale = make("dwa", scale_window=window)
    for step, means in enumerate(COURSE):
        epochs = [COURSE[first : first + window] for first in range(0, step - window + 1, window)]
        epochs = [[sum(column) / window for column in zip(*epoch, strict=True)] for epoch in epochs]
        ratio = [1.0] * 3 if len(epochs) < 2 else [a / b for a, b in zip(epochs[-1], epochs[-2], strict=True)]
        expected = torch.tensor(ratio).div(2.0).softmax(0).mul(3.0).tolist()
        assert one(scale, given(*means)) == pytest.approx(expected, rel=1e-5), step


def test_famo_is_what_the_formula_gives() -> None:
    """Autograd through the softmax, and torch's Adam with gamma as its decay, on the change to the next batch."""
    scale, logits = make("famo", scale_rate=0.1), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, weight_decay=1e-3)
    previous = None
    for means in COURSE:
        now = torch.tensor(means, dtype=torch.float64)
        raw = (logits.detach().softmax(0) / now).tolist()
        assert one(scale, given(*means)) == pytest.approx(normalised(raw), rel=1e-4)
        if previous is not None:
            (logits.grad,) = torch.autograd.grad(logits.softmax(0) @ (previous.log() - now.log()), logits)
            adam.step()
        previous = now
    assert logits.detach().diff().max() < -0.5, "what falls faster must weigh less for this to mean anything"


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_is_what_the_formula_gives(alpha: float) -> None:
    """Autograd through the paper's loss of the weights, and torch's Adam."""
    lengths = [6.0, 1.0, 0.5]
    scale, w = make("gradnorm", scale_rate=0.1, scale_alpha=alpha), torch.ones(3, dtype=torch.float64)
    w.requires_grad_()
    adam, unit = torch.optim.Adam([w], lr=0.1), torch.tensor(lengths, dtype=torch.float64)
    for means in COURSE:
        assert one(scale, given(*means), lengths) == pytest.approx(normalised(w.tolist()), rel=1e-4)
        length = w * unit / unit.mean()
        rate = torch.tensor(means, dtype=torch.float64) / torch.tensor(COURSE[0], dtype=torch.float64)
        target = (length.mean() * (rate / rate.mean()) ** alpha).detach()
        (w.grad,) = torch.autograd.grad((length - target).abs().sum(), w)
        adam.step()
        with torch.no_grad():
            w.clamp_(min=1e-3).mul_(3.0 / w.sum())
    if not alpha:
        assert (w * unit).tolist() == pytest.approx([float((w * unit).mean().detach())] * 3, rel=0.2), "of equal length"


@EVERY
def test_a_dominating_loss_gets_a_smaller_weight(kind: str) -> None:
    """It is larger, has the longer gradient, and falls faster than the others."""
    scale = make(kind, scale_rate=0.05, **({"scale_window": 5} if kind == "dwa" else {}))
    optimizer = torch.optim.Adam(scale.parameters(), lr=0.05) if list(scale.parameters()) else None
    for step in range(60):
        found = one(scale, given(40.0 * 0.98**step, 1.0, 1.0), [40.0, 1.0, 1.0])
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    assert found[0] < 0.99 < 1.0 < found[1] and found[1] == pytest.approx(found[2])
    assert sum(found) == pytest.approx(3.0)


@EVERY
def test_a_single_loss_keeps_its_weight(kind: str) -> None:
    alone = make(kind, names=("a",))
    beside = make(kind)
    for step in range(1, 8):
        assert one(alone, given(5.0 / step), [2.0]) == [1.0]
        assert one(beside, given(5.0 / step, None, None), [2.0, 0.0, 0.0]) == pytest.approx([1.0] * 3)


@EVERY
def test_losses_that_are_alike_are_weighed_alike(kind: str) -> None:
    scale = make(kind)
    for step in range(1, 8):
        assert one(scale, given(*[3.0 / step] * 3), [1.0] * 3) == pytest.approx([1.0] * 3)


def state(scale: LossScale) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in scale.state_dict().items()}


@EVERY
@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_loss_that_is_absent_or_broken_changes_nothing_of_its_own(kind: str, bad: float | None) -> None:
    scale = make(kind, **({"scale_window": 2} if kind == "dwa" else {}))
    for means in COURSE[:4]:  # two whole windows
        one(scale, given(*means), [1.0, 2.0, 3.0])
    before = state(scale)
    length = 0.0 if bad is None else bad
    w_L = one(scale, given(COURSE[5][0], bad, COURSE[5][2]), [1.0, length, 3.0])
    assert w_L[1] == 1.0 and w_L[0] + w_L[2] == pytest.approx(2.0)
    after = state(scale)
    for name in set(after) - {"weight_L", "steps"}:  # weights are scaled to a sum
        assert after[name][1] == before[name][1], name
    for means in COURSE[6:9]:
        found = one(scale, given(*means), [1.0, 2.0, 3.0])
        assert all(map(math.isfinite, found)) and sum(found) == pytest.approx(3.0)
    assert all(math.isfinite(number) for values in state(scale).values() for number in torch.tensor(values).flatten())


@EVERY
def test_a_batch_of_broken_losses_has_no_weights(kind: str) -> None:
    scale = make(kind)
    before = state(scale)
    assert one(scale, given(math.nan, math.nan, None), [math.nan] * 3) == [1.0] * 3
    assert {name: value for name, value in state(scale).items() if name != "steps"} == {
        name: value for name, value in before.items() if name != "steps"
    }


@EVERY
def test_micro_batches_count_as_one_batch(kind: str) -> None:
    whole, parts = make(kind), make(kind)
    for means in COURSE[:10]:
        low, high = [0.5 * mean for mean in means], [1.5 * mean for mean in means]
        one(whole, given(*means, samples=8.0), [5.0, 2.0, 1.0])
        for half in (low, high):
            w_L, _ = parts.weigh(given(*half), torch.ones(3), parts())
            if isinstance(parts, GradNorm):
                numbers_L = torch.arange(3)
                parts.watch(torch.diag(w_L * torch.tensor([5.0, 2.0, 1.0]))[None], numbers_L[None], numbers_L)
        parts.step()
    for name, values in state(whole).items():
        assert state(parts)[name] == pytest.approx(values, rel=1e-6), name


@EVERY
def test_ranks_sum_their_losses_before_they_learn(kind: str) -> None:
    """Two ranks of which each has one half, by turns; and one rank with all."""
    halves, both = given(4.0, 1.0, None), given(None, 3.0, 0.5)
    alone, rank = make(kind), make(kind, reduce=lambda tensor: tensor + other[0])
    other = [both]
    for step in range(1, 6):
        other = [both / step]
        w_L, _ = rank.weigh(halves / step, torch.ones(3), rank())
        found_L, _ = alone.weigh((halves + both) / step, torch.ones(3), alone())
        assert torch.equal(w_L, found_L)
        other = [torch.zeros(3)]  # of gradients there are none
        alone.step()
        rank.step()
    assert state(rank) == state(alone)


@EVERY
def test_state_goes_on_from_a_checkpoint(kind: str) -> None:
    whole = make(kind, **({"scale_window": 3} if kind == "dwa" else {}))
    for means in COURSE[:7]:
        one(whole, given(*means), [3.0, 2.0, 1.0])
    again = make(kind, **({"scale_window": 3} if kind == "dwa" else {}))
    again.load_state_dict(whole.state_dict())
    for means in COURSE[7:]:
        assert one(again, given(*means), [3.0, 2.0, 1.0]) == one(whole, given(*means), [3.0, 2.0, 1.0])


@EVERY
def test_half_precision_leaves_the_state_exact(kind: str) -> None:
    scale = make(kind).bfloat16()
    assert all(value.dtype in (torch.float64, torch.int64) for value in scale.buffers())


def test_what_was_shown_is_the_mean_weight() -> None:
    scale = make("famo")
    first, second = one(scale, given(4.0, 1.0, None)), one(scale, given(1.0, 1.0, None))
    assert scale.take() == pytest.approx({"a": (first[0] + second[0]) / 2, "b": (first[1] + second[1]) / 2})
    assert scale.take() == {}


OBJECTIVES = {"masked": {"weight": 2.0}, "contrastive": {"weight": 1.0}, "similarity": {"weight": 3.0}}


def objective(run: Run, kind: str) -> tuple[Objective, LossScale | None]:
    run.config.harmonize.scale = kind  # type: ignore[assignment]
    run.model.fork = build_fork(run.config, run.model)
    run.model.scale = scale = build_scale(run.config, run.model)
    allowed_LME = run.model.trunk.allowed()
    made = Objective(run.catalogue, run.config, World(), total_steps=4, allowed_LME=allowed_LME, scale=scale)
    return made, scale


def test_weights_multiply_the_losses_besides_their_own(tmp_path: Any) -> None:
    tasks = [{"name": "shapes", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5", "weight": 3.0}]
    run = Run(tmp_path, objectives=OBJECTIVES, data={"root": str(tmp_path), "num_workers": 0, "tasks": tasks})
    plain, none = objective(run, "none")
    assert none is None and run.model.fork is None
    output = run.model(run.batch)
    without = plain(output, run.batch)
    weighed, scale = objective(run, "famo")
    found = weighed(output, run.batch)
    assert scale is not None and scale.losses == ("shapes", "tones", "masked", "contrastive", "similarity")
    w = scale.take()
    losses = {"shapes": without.sums_T[0], "tones": 3.0 * without.sums_T[1]}
    losses |= {name: OBJECTIVES[name]["weight"] * loss for name, (loss, _) in output.pretext.items()}
    losses = {name: float(loss.detach()) for name, loss in losses.items()}
    factor = 1.0 / run.config.train.batch_size
    change = sum((w[name] - 1.0) * loss for name, loss in losses.items())
    assert float((found.backward - without.backward).detach()) == pytest.approx(factor * change, rel=1e-3)
    assert abs(change) > 1.0 and sum(w.values()) == pytest.approx(5.0)


def test_gradnorm_sees_the_lengths_at_the_fork_without_weights(tmp_path: Any) -> None:
    """A contrastive objective is one loss; two tasks over different samples need not meet."""
    tasks = [{"name": "shapes", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5", "weight": 3.0}]
    run = Run(tmp_path, objectives=OBJECTIVES, data={"root": str(tmp_path), "num_workers": 0, "tasks": tasks})
    weighed, scale = objective(run, "gradnorm")
    assert isinstance(scale, GradNorm) and run.model.fork is not None
    with torch.no_grad():
        scale.weight_L.copy_(torch.tensor([0.5, 0.7, 0.8, 1.5, 1.5]))
    weighed(run.model(run.batch), run.batch).backward.backward()
    found_L = scale._squares_L
    assert found_L is not None and (found_L > 0).all()
    run.model.fork = run.model.scale = None
    expected = []
    for name in scale.losses:
        captured: list[torch.Tensor] = []
        handle = run.model.trunk.register_forward_hook(lambda _, __, out, kept=captured: kept.append(out[0][-1]))
        output = run.model(run.batch)
        handle.remove()
        loss = (
            output.pretext[name][0]
            if name in output.pretext
            else F.cross_entropy(output.outputs[name], run.batch.targets[name], reduction="sum")
        )
        (z_TD,) = torch.autograd.grad(loss, captured[0])
        expected.append(float(z_TD.square().sum()))
    assert (found_L * run.config.train.batch_size**2).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("harmonize", "message"),
    [
        ({"scale": "uncertainity"}, "harmonize.scale: is not one of the choices"),
        (
            {"scale": "dwa", "scale_rate": 0.1},
            "scale_rate.* has no meaning with `harmonize.scale: dwa`; it is",
        ),
        ({"scale": "famo", "scale_window": 7}, "scale_window.* has no meaning with `harmonize.scale: famo`"),
        ({"scale_alpha": 0.5}, "scale_alpha.* has no meaning with `harmonize.scale: none`"),
        ({"scale": "dwa", "scale_window": 0}, "harmonize.scale_window"),
    ],
)
def test_refused(tmp_path: Any, harmonize: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, harmonize=harmonize)


def test_gradnorm_after_every_block_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match=r"predict_every_block.*of the last alone"):
        tiny_config(tmp_path, harmonize={"scale": "gradnorm"}, model={"predict_every_block": True})


def test_a_task_with_the_name_of_an_objective_is_refused(tmp_path: Any) -> None:
    tasks = [{"name": "masked", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5"}]
    data = {"root": str(tmp_path), "num_workers": 0, "tasks": tasks}
    run = Run(tmp_path, objectives={"masked": {"weight": 1.0}}, data=data, harmonize={"scale": "dwa"})
    with pytest.raises(ConfigError, match="the task masked and objectives"):
        build_scale(run.config, run.model)


def test_a_run_of_one_loss_is_refused(tmp_path: Any) -> None:
    tasks = {"root": str(tmp_path), "num_workers": 0, "tasks": [{"name": "shapes", "file": "shapes.h5"}]}
    run = Run(tmp_path, objectives={}, data=tasks, harmonize={"scale": "dwa"})
    with pytest.raises(ConfigError, match=r"this run has one loss, whose weight is 1\n  given: shapes"):
        build_scale(run.config, run.model)
