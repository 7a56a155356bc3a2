"""The routers' statistics between reports: complete, and without waiting for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moemm.moe import RouterStats
from moemm.train import routing as module
from moemm.train.routing import RoutingWindow

NUM_LAYERS, NUM_ROWS, NUM_EXPERTS = 5, 3, 4


def stats(seed: int = 0, device: str = "cpu") -> RouterStats:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, 9, shape, generator=generator).float().to(device)

    by_expert = [draw(NUM_LAYERS, NUM_ROWS, NUM_EXPERTS) for _ in range(3)]
    by_row = [draw(NUM_LAYERS, NUM_ROWS) for _ in range(4)]
    return RouterStats(*by_expert, *by_row, draw(NUM_ROWS))


def test_sums_of_all_micro_batches_and_then_anew() -> None:
    window, parts = RoutingWindow(), [stats(seed) for seed in range(3)]
    for part in parts:
        part.prob_LME.requires_grad_()
        window.add(part)
    found = window.take()
    assert found is not None
    for name in module.PARTS:
        expected = sum(getattr(part, name).detach() for part in parts)
        np.testing.assert_array_equal(getattr(found, name), expected.numpy())
    assert window.take() is None


def test_large_counts_stay_exact() -> None:
    window, one = RoutingWindow(), stats()
    one.load_LME = torch.full((1, 1, 1), 2.0**24)
    window.add(one)
    one.load_LME = torch.ones(1, 1, 1)
    window.add(one)
    found = window.take()
    assert found is not None and found.load_LME.item() == 2**24 + 1  # fp32 would lose the 1


def test_ranks_add_up_in_one_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(module, "sum_over_ranks", lambda flat: calls.append(flat) or 2 * flat)
    window, one = RoutingWindow(), stats()
    window.add(one)
    found = window.take()
    assert found is not None and len(calls) == 1
    np.testing.assert_array_equal(found.tokens_M, 2 * one.tokens_M.numpy())


def test_nothing_is_read_from_the_device_between_reports() -> None:
    window = RoutingWindow()
    for seed in range(3):
        window.add(stats(seed, device="meta"))  # tensors without values: reading one fails
    with pytest.raises((NotImplementedError, RuntimeError)):
        window.take()


def test_models_without_a_router() -> None:
    window = RoutingWindow()
    window.add(None)
    assert window.take() is None
