"""The random states of a rank as plain tensors: dropout goes on after a resume as if nothing had been."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

State = dict[str, torch.Tensor]
NAMES = frozenset({"torch", "python", "python_gauss", "numpy", "numpy_position", "numpy_gauss"})
"""Those that every state has."""


def capture() -> State:
    """States of torch (CPU and this rank's GPU), numpy and random, as integer tensors."""
    version, words, gauss = random.getstate()
    assert gauss is None or isinstance(gauss, float)
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words]),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: State) -> None:
    """Set what `capture` returned."""
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever draws random numbers inside leaves the outer sequence as it was."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
