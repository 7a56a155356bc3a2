"""From matrices to groups: planted families, in both measures, and the right way round."""

from __future__ import annotations

import numpy as np
import pytest

from moemm.analyze import Merge, Transfer, agglomerate, cut, largest_jump

NAMES = ("a", "x", "b", "y", "c")
FAMILIES = [("a", "b", "c"), ("x", "y")]


def planted() -> np.ndarray:
    """(5, 5) bits gained: 2 through one's own trunk, 1.8 inside a family, little across, less from a, b, c to x, y."""
    random = np.random.default_rng(0)
    family = np.array([0, 1, 0, 1, 0])
    gain_ST = np.where(family[:, None] == family, 1.8, np.where(family[:, None] == 0, 0.1, 0.6))
    gain_ST = gain_ST + random.normal(size=(5, 5)) * 0.02
    np.fill_diagonal(gain_ST, 2.0)
    return gain_ST


def groups(transfer: Transfer, number: int = 2) -> list[tuple[str, ...]]:
    return cut(NAMES, agglomerate(NAMES, transfer.distance()), number)


def test_families_are_found_from_gains_and_from_losses() -> None:
    gain_ST = planted()
    assert groups(Transfer("pvi", NAMES, gain_ST)) == FAMILIES
    assert groups(Transfer("zero-shot", NAMES, 2.0 - gain_ST)) == FAMILIES


def test_the_sign_matters() -> None:
    gain_ST = planted()
    assert groups(Transfer("pvi", NAMES, 2.0 - gain_ST)) != FAMILIES
    assert groups(Transfer("zero-shot", NAMES, gain_ST - np.diag(np.full(5, 2.0)))) != FAMILIES


def test_a_loss_is_the_targets() -> None:
    bits_ST = np.array([[3.0, 0.5], [2.0, 1.0]])  # s loses 1 through t, t loses 0.5 through s
    transfer = Transfer("pvi", ("s", "t"), bits_ST)
    np.testing.assert_allclose(transfer.loss_ST, [[0.0, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(transfer.distance(), [[0.0, 0.75], [0.75, 0.0]])


def test_a_distance_is_not_negative() -> None:
    transfer = Transfer("zero-shot", ("s", "t"), np.array([[0.0, -0.5], [0.1, 0.0]]))
    assert transfer.distance().max() == 0.0


def test_average_linkage_by_hand() -> None:
    distance = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 2.0], [4.0, 2.0, 0.0]])
    assert agglomerate(("p", "q", "r"), distance) == [Merge(("p",), ("q",), 1.0), Merge(("p", "q"), ("r",), 3.0)]


def test_every_number_of_groups() -> None:
    merges = agglomerate(NAMES, Transfer("pvi", NAMES, planted()).distance())
    for number in range(1, 6):
        found = cut(NAMES, merges, number)
        assert len(found) == number and sorted(name for group in found for name in group) == sorted(NAMES)
    assert cut(NAMES, merges, 5) == [(name,) for name in NAMES]
    assert largest_jump(merges) == 2


def test_one_modality_has_one_group() -> None:
    assert agglomerate(("a",), np.zeros((1, 1))) == []
    assert cut(("a",), [], 1) == [("a",)] and largest_jump([]) == 1


def test_a_distance_that_is_not_symmetric_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        agglomerate(("a", "b"), np.array([[0.0, 1.0], [2.0, 0.0]]))
