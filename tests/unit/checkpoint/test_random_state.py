from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from moemm.checkpoint.random_state import capture, preserved, restore


def draw() -> list[float]:
    numbers = [random.random(), random.gauss(0, 1), float(np.random.normal()), float(np.random.rand())]
    return [*numbers, *torch.rand(3).tolist(), float(torch.randn(()))]


def test_goes_on_the_same_also_through_a_file(tmp_path: Path) -> None:
    draw()  # leaves half a pair of Gaussians in random and numpy
    state = capture()
    expected = [draw(), draw()]
    restore(state)
    assert [draw(), draw()] == expected
    save_file(state, tmp_path / "state.safetensors")
    draw()
    restore(load_file(tmp_path / "state.safetensors"))
    assert [draw(), draw()] == expected


def test_fresh_seeds_too() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    state = capture()
    expected = draw()
    restore(state)
    assert draw() == expected


def test_preserved_leaves_no_trace() -> None:
    state = capture()
    expected = draw()
    restore(state)
    with preserved():
        draw()
    assert draw() == expected
