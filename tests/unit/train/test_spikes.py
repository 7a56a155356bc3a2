"""Spikes are found by what came before, and do not change it."""

from __future__ import annotations

import random

import pytest

from moemm.train.spikes import LEAST, WINDOW, Spikes


def filled(limit: float, number: int) -> Spikes:
    spikes, draw = Spikes(limit), random.Random(0)
    for _ in range(number):
        spikes.add(draw.gauss(2.0, 0.1))
    return spikes


def test_a_loss_far_above_the_others_is_a_spike_and_one_below_is_not() -> None:
    spikes = filled(8.0, 100)
    assert spikes.excess(3.5) == pytest.approx(15.0, rel=0.3)
    assert spikes.excess(2.4) is None and spikes.excess(0.1) is None


def test_nothing_is_said_of_a_short_past() -> None:
    assert filled(8.0, LEAST - 1).excess(1e9) is None
    assert filled(8.0, LEAST).excess(1e9) is not None


def test_spikes_that_were_applied_before_hide_none() -> None:
    spikes = filled(8.0, 100)
    for _ in range(20):  # of the time before they were looked for
        spikes.add(1e6)
    assert spikes.excess(3.5) is not None


def test_equal_losses_have_no_deviation_to_divide_by() -> None:
    spikes = Spikes(8.0)
    for _ in range(WINDOW + 5):
        spikes.add(2.0)
    assert spikes.excess(2.0) is None and spikes.excess(2.1) is not None
