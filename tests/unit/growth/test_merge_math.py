"""The arithmetic of merging, against plain torch and by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import cast

import pytest
import torch
from merge_cases import write_run
from torch.nn import functional as F

from moemm.growth import read_base
from moemm.growth.align import match_units, merge_pairs, permuted, run_expert
from moemm.growth.alike import first_difference
from moemm.growth.fisher import diagonal_fisher
from moemm.growth.judge import mean_score
from moemm.growth.samples import training_batches
from moemm.growth.soup import changed_bits, fisher_soup, task_vector, uniform_soup
from moemm.models import Model

Weights = dict[str, torch.Tensor]


def drawn(seed: int) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 3, generator=draw),
        "tiny": torch.randn(4, generator=draw) * 1e-42,  # denormal
        "zero": torch.tensor([0.0, -0.0]),
        "steps": torch.tensor(seed),
    }


def test_uniform_is_the_mean() -> None:
    runs = [drawn(seed) for seed in range(3)]
    made = uniform_soup(runs)
    torch.testing.assert_close(made["w"], torch.stack([run["w"] for run in runs]).double().mean(0).float())
    assert made["steps"] == 0, "a state that is no number to average is the first run's"


@pytest.mark.parametrize("times", [1, 2, 3, 7])
def test_merging_a_run_with_itself_changes_no_bit(times: int) -> None:
    run = drawn(1)
    fisher = {"w": torch.rand(5, 3, dtype=torch.float64), "zero": torch.zeros(2, dtype=torch.float64)}
    assert changed_bits(run, uniform_soup([run] * times)) == 0
    assert changed_bits(run, fisher_soup([run] * times, [fisher] * times)) == 0
    assert changed_bits(run, task_vector(run, [run], 1 / times)) == 0
    assert changed_bits(run, task_vector({**run, "zero": -run["zero"]}, [drawn(2)] * times, 0.0)) == 1


def test_changed_bits_sees_the_sign_of_zero_and_types() -> None:
    run = drawn(1)
    assert changed_bits(run, {**run, "zero": torch.zeros(2)}) == 1
    assert changed_bits(run, {**run, "w": run["w"].double(), "steps": torch.tensor(2)}) == 2


def test_fisher_weighs_each_parameter() -> None:
    runs = [{"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor(2.0)}, {"a": torch.zeros(3), "b": torch.tensor(4.0)}]
    fishers = [{"a": torch.tensor([3.0, 1e9, 0.0]).double()}, {"a": torch.tensor([1.0, 0.0, 0.0]).double()}]
    made = fisher_soup(runs, fishers)
    floor = 1e-6 * (1e9 + 4.0) / 6
    torch.testing.assert_close(made["a"][0], torch.tensor((3.0 + floor) / (4.0 + 2 * floor)))
    torch.testing.assert_close(made["a"][1:], torch.tensor([1.0, 0.5]), rtol=1e-5, atol=0.0)
    assert made["b"] == 3.0, "without a Fisher value runs count the same"
    assert fisher_soup(runs, [{"a": torch.zeros(3).double()}] * 2)["a"].tolist() == [0.5] * 3


def test_task_vectors_add_up() -> None:
    base, one, two = (drawn(seed) for seed in range(3))
    made = task_vector(base, [one, two], 0.4)["w"]
    torch.testing.assert_close(made, base["w"] + 0.4 * ((one["w"] - base["w"]) + (two["w"] - base["w"])))
    assert changed_bits({"w": one["w"]}, task_vector(base, [one], 1.0)) == 0


@pytest.fixture(scope="module")
def model_and_batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list]:  # type: ignore[type-arg]
    run = read_base(write_run(tmp_path_factory.mktemp("fisher"), "run")).run
    return cast(Model, run.model), training_batches(run, 6, size=1)


def test_fisher_of_a_bias_is_the_variance_of_its_label(model_and_batch: tuple[Model, list]) -> None:  # type: ignore[type-arg]
    """Cross entropy: the gradient of a bias is p - onehot(y), whose mean square over y ~ p is p (1 - p)."""
    model, batches = model_and_batch
    task = model.tasks[int(batches[0].task[0])].name
    with torch.no_grad():
        p = model(batches[0]).outputs[task][0].double().softmax(-1)
    number = 250
    found = diagonal_fisher(model, batches[:1] * number)[f"heads.linear.{task}.bias"]
    deviation = ((p * (1 - p)).sqrt() * (1 - 2 * p).abs()) / math.sqrt(number)
    assert torch.all((found - p * (1 - p)).abs() < 4 * deviation) and torch.all(deviation < 0.02)


def test_fisher_is_the_mean_of_squared_gradients_of_single_samples(model_and_batch: tuple[Model, list]) -> None:  # type: ignore[type-arg]
    """Against backward() in a loop, with the labels drawn in the same order."""
    model, batches = model_and_batch
    draw = torch.Generator().manual_seed(3)
    expected = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for batch in batches:
        (task,) = [task for task in model.tasks if len(batch.targets[task.name])]
        model.zero_grad()
        output = model(batch).outputs[task.name]
        label = torch.multinomial(output.detach().softmax(-1), 1, generator=draw)[:, 0]
        F.cross_entropy(output, label).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.double() ** 2 / len(batches)
    model.zero_grad()
    found = diagonal_fisher(model, batches, seed=3)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_does_not_read_the_labels(model_and_batch: tuple[Model, list]) -> None:  # type: ignore[type-arg]
    model, batches = model_and_batch
    others = [replace(b, targets={name: (y + 1) % 3 for name, y in b.targets.items()}) for b in batches]
    before, after = diagonal_fisher(model, batches), diagonal_fisher(model, others)
    assert all(torch.equal(before[name], after[name]) for name in before)


def expert(activation: str, hidden: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows = 2 * hidden if activation == "swiglu" else hidden
    return torch.randn(rows, 6, generator=draw), torch.randn(6, hidden, generator=draw)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
def test_exchanged_hidden_units_are_found_and_change_nothing(activation: str) -> None:
    pair = expert(activation, 16)
    order_F = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    other = permuted(pair, order_F)
    assert not torch.equal(other[0], pair[0])
    x_ND = torch.randn(9, 6, dtype=torch.float64)
    before, after = (run_expert((w1.double(), w2.double()), x_ND, activation) for w1, w2 in (pair, other))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    back = permuted(other, match_units(pair, other))
    assert torch.equal(back[0], pair[0]) and torch.equal(back[1], pair[1])


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_matching_is_the_best_of_all_orders(activation: str) -> None:
    """Against every one of 5! orders."""
    one, two = expert(activation, 5), expert(activation, 5, seed=7)

    def products(order: tuple[int, ...]) -> float:
        w1, w2 = permuted(two, torch.tensor(order))
        return float((one[0] * w1).sum() + (one[1] * w2).sum())

    best = max(itertools.permutations(range(5)), key=products)
    assert match_units(one, two).tolist() == list(best) != list(range(5))


def test_aligned_experts_are_averaged_by_their_shares() -> None:
    one, two = expert("gelu", 4), expert("gelu", 4, seed=2)
    made = merge_pairs([one, two], [0.25, 0.75])
    for number in (0, 1):
        torch.testing.assert_close(made[number], 0.25 * one[number] + 0.75 * two[number])


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 2]}, None),
        ({"a": {"b": [1, {"c": 2}]}}, {"a": {"b": [1, {"c": 3}]}}, ("a.b.1.c", "2", "3")),
        ({"a": [1, 2]}, {"a": [1]}, ("a", "2 entries", "1 entries")),
        ({"a": 1}, {"a": 1, "b": 2}, ("b", "nothing", "2")),
        ({"a": float("nan")}, {"a": float("nan")}, None),
        ({"a": None}, {"a": False}, ("a", "null", "false")),
    ],
)  # fmt: skip
def test_the_first_difference_is_named(one: object, other: object, found: object) -> None:
    assert first_difference(one, other) == found


def test_errors_count_as_their_share_of_the_first(model_and_batch: tuple[Model, list]) -> None:  # type: ignore[type-arg]
    model, _ = model_and_batch
    tasks = (model.tasks[0], replace(model.tasks[1], metric="rmse"))
    reference = {tasks[0].name: 0.5, tasks[1].name: 4.0}
    values: dict[str, float | None] = {tasks[0].name: 0.75, tasks[1].name: 3.0}
    assert mean_score(values, reference, tasks) == pytest.approx((0.75 + 0.25) / 2)
    assert mean_score({**values, tasks[1].name: None}, reference, tasks) == -math.inf
    assert mean_score({**values, tasks[1].name: None}, {tasks[0].name: 0.5}, tasks) == 0.75
