"""Random numbers that belong to a token, not to a process: what is hidden is a function of (seed, step, sample).

So two ranks with half the batch hide what one rank hides, micro-batches and resumes change nothing, and the generator
that dropout draws from is left alone. Mixing function: SplitMix64's (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import torch

MASK, CROSS, WHICH, REPLACE = range(4)
"""What a draw is for."""
_FIRST, _SECOND, _GAMMA = (value - 2**64 for value in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15))


def combine(*parts: torch.Tensor | int) -> torch.Tensor:
    """int64 hashes of tuples, broadcast over the tensors among the parts (int64)."""
    found = torch.zeros((), dtype=torch.int64)
    for part in parts:
        if isinstance(part, torch.Tensor):
            found = found.to(part.device)
        found = _mix(found + _GAMMA + part)
    return found


def uniform(keys: torch.Tensor, purpose: int) -> torch.Tensor:
    """float32 in [0, 1), one for each key."""
    return _shift(combine(keys, purpose), 40).float() * 2.0**-24


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, as if unsigned."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
