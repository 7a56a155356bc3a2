"""The guard's arithmetic in one process; that it fires between processes is shown in tests/distributed."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
from torch import nn

from moemm.distributed import ExpertGroups
from moemm.errors import HealthError
from moemm.train import guard as guard_module
from moemm.train.guard import GradientGuard, backward_order, fingerprint, first_difference


class Branches(nn.Module):
    """Shared weights, branches, gather and scatter, a weight used twice and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stems = nn.ModuleList(nn.Linear(4, 8) for _ in range(5))
        self.shared, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.table = nn.Embedding(7, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.idle = nn.Linear(2, 2)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, sizes: list[int]) -> torch.Tensor:
        parts = [stem(torch.randn(n, 4)) for stem, n in zip(self.stems, sizes, strict=True)]
        x = torch.cat([*parts, self.table(torch.randint(7, (3,)))])
        x = x + self.shared(self.norm(x)) * self.scale
        x = x.index_select(0, torch.randperm(len(x)))
        x = self.frozen(x + self.shared(x).relu() * self.scale)
        return x.pow(2).mean() + sum(part.sum() * 0 for part in parts)


@pytest.mark.parametrize("sizes", [[1, 2, 3, 4, 5], [0, 0, 3, 0, 0], [0, 0, 0, 0, 0]])
def test_order_from_the_graph_is_the_order_that_happens(sizes: list[int]) -> None:
    model = Branches()
    parameters = [p for p in model.parameters() if p.requires_grad]
    positions = {p: i for i, p in enumerate(parameters)}
    happened: list[int] = []
    for p in parameters:
        p.register_post_accumulate_grad_hook(lambda p: happened.append(positions[p]))
    loss = model(sizes)
    planned = backward_order(loss.grad_fn, positions)
    loss.backward()
    assert planned == happened
    assert len(set(planned)) == len(planned) == len(parameters) - 2, "the idle layer has no gradient"


def test_fingerprint_tells_order_and_membership_apart_and_fits_an_int64() -> None:
    lists = [[], [0], [0, 1], [1, 0], [1], list(range(1000))]
    marks = [fingerprint(one) for one in lists]
    assert len(set(marks)) == len(marks)
    assert all(0 <= mark < 2**63 for mark in marks)
    digest = hashlib.sha256(b"\0" * 8).digest()[:8]
    assert fingerprint([0]) == int.from_bytes(digest, "little") >> 1


def test_difference_names_what_only_one_side_has() -> None:
    text = first_difference(["a", "b", "c"], ["a", "d"], "rank 0", "rank 3")
    assert text == "only rank 0: b, c; only rank 3: d"
    many = first_difference([str(i) for i in range(9)], [], "rank 0", "rank 1")
    assert many.endswith("0, 1, 2, 3 and 5 more")


@pytest.mark.parametrize(
    ("left", "right", "said"),
    [
        (["a", "b", "c"], ["a", "c", "b"], "from number 1 on: rank 0 has b, rank 1 has c"),
        (["a", "b"], ["a", "b", "a"], "from number 2 on: rank 0 has nothing, rank 1 has a"),
    ],
)
def test_difference_finds_where_the_order_parts(left: list[str], right: list[str], said: str) -> None:
    assert said in first_difference(left, right, "rank 0", "rank 1")


def test_one_process_sends_nothing_and_hooks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "max_over_ranks", pytest.fail)
    model = Branches()
    guard = GradientGuard(model, world_size=1)
    loss = model([1, 1, 1, 1, 1])
    assert guard.before_backward(loss, flags=[0, 15]) == [0, 15]
    loss.backward()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


class OtherRank:
    """Stands in for the collectives: another rank that would send `marks` (largest wins) and holds `names`."""

    def __init__(self, names: list[str], monkeypatch: pytest.MonkeyPatch, *, equal: bool) -> None:
        self.names, self.equal, self.messages = names, equal, 0
        monkeypatch.setattr(guard_module, "max_over_ranks", self.max_over_ranks)
        monkeypatch.setattr(guard_module, "gather_objects", lambda mine: [mine, self.names])

    def max_over_ranks(self, values: list[int]) -> list[int]:
        self.messages += 1
        return list(values) if self.equal else [value + 1 for value in values]


def test_two_messages_a_pass_and_no_error_where_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    other = OtherRank([], monkeypatch, equal=True)
    model = Branches()
    guard = GradientGuard(model, world_size=2)
    for _ in range(2):
        loss = model([1, 0, 1, 0, 1])
        guard.before_backward(loss, flags=[0])
        loss.backward()
    assert other.messages == 4


def test_error_comes_before_any_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    OtherRank(["stems.0.weight"], monkeypatch, equal=False)
    model = Branches()
    guard = GradientGuard(model, world_size=2)
    with pytest.raises(HealthError, match=r"only rank 0: scale, .*and \d+ more"):
        guard.before_backward(model([1, 0, 1, 0, 1]))
    assert all(p.grad is None for p in model.parameters())


def test_an_alarm_is_returned_and_not_hidden_by_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    OtherRank([], monkeypatch, equal=False)
    model = Branches()
    guard = GradientGuard(model, world_size=2)
    assert guard.before_backward(model([1] * 5), flags=[0, 2]) == [1, 3]


def test_calls_of_modules_are_compared_for_zero_3(monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(values: list[int]) -> list[int]:
        return [values[0], values[1] + 1, *values[2:]]

    monkeypatch.setattr(guard_module, "max_over_ranks", differ)
    monkeypatch.setattr(guard_module, "gather_objects", lambda mine: [mine, mine[::-1]])
    model = Branches()
    guard = GradientGuard(model, world_size=2, watch_forward=True)
    with pytest.raises(HealthError, match=r"calls of modules.*\n.*another order"):
        guard.before_backward(model([1] * 5))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        return None


def test_a_gradient_that_a_kernel_leaves_out_becomes_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    OtherRank([], monkeypatch, equal=True)
    layer = nn.Linear(3, 3)
    guard = GradientGuard(layer, world_size=2)
    loss = NoGradient.apply(layer(torch.ones(2, 3))).sum()
    guard.before_backward(loss)
    loss.backward()
    assert layer.weight.grad is not None and not layer.weight.grad.any()


class SpreadBranches(nn.Module):
    """Two experts of a layer that other ranks do not have, among parameters that all have."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.one, self.two, self.behind = (nn.Linear(4, 4, bias=False) for _ in range(4))


@pytest.mark.parametrize(
    ("order", "common"),
    [
        ([3, 1, 2, 0], ["behind.weight", "layer.experts", "before.weight"]),
        ([3, 2, 1, 0], ["behind.weight", "layer.experts", "before.weight"]),
        ([3, 1, 0, 2], ["behind.weight", "layer.experts", "before.weight", "layer.experts"]),
    ],
)
def test_what_all_ranks_have_in_common_names_the_experts_of_a_layer_once(
    monkeypatch: pytest.MonkeyPatch, order: list[int], common: list[str]
) -> None:
    model = SpreadBranches()
    spread = [("layer.experts", model.one.weight), ("layer.experts", model.two.weight)]
    monkeypatch.setattr(guard_module, "spread_parameters", lambda _: spread)
    guard = GradientGuard(model, ExpertGroups(size=2, position=1), world_size=2)
    assert [guard.labels[number] for number in guard._common(order)] == common
    marks = guard._marks(order)
    assert marks[1] is None and marks[2] == fingerprint(order), "what is compared among ranks of position 1"


def test_a_mark_of_another_position_says_nothing() -> None:
    ends = [guard_module._both_ends(marks) for marks in ([5, None, 8], [5, 3, None], [5, None, 9])]
    largest = [max(values) for values in zip(*ends, strict=True)]
    assert guard_module._differ(largest) == [False, False, True]
