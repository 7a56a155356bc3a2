from __future__ import annotations

import json

import numpy as np
import pytest
from routing_cases import EVEN, NAMES, report

from moemm.observe.routing import RouterReport, RoutingNames

ALL_124 = np.ones((1, 1, 4), bool)


@pytest.mark.parametrize(
    ("load", "tokens", "expected"),
    [
        ([25, 25, 25, 25], 100, 1.0),
        ([100, 0, 0, 0], 100, 0.0),
        ([50, 50, 0, 0], 100, 0.5),  # log 2 / log 4
        ([50, 50, 0, 0], 50, 0.0),  # two choices a token: nothing more uneven is possible
        ([50, 50, 50, 50], 100, 1.0),
        ([40, 40, 20, 20], 60, (np.log(3) + np.log(6) / 3 - np.log(3) / 3 - np.log(2)) / np.log(2)),
    ],
)
def test_evenness(load: list[int], tokens: int, expected: float) -> None:
    found = report([[load]], tokens=[tokens]).evenness_LM(ALL_124)[0, 0]
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("load", "tokens", "allowed"),
    [([9, 0, 0, 0], 9, [1, 0, 0, 0]), ([0, 0, 0, 0], 0, [1, 1, 1, 1]), ([9, 9, 0, 0], 9, [1, 1, 0, 0])],
)
def test_no_evenness_where_there_is_no_choice(load: list[int], tokens: int, allowed: list[int]) -> None:
    assert np.isnan(report([[load]], tokens=[tokens]).evenness_LM(np.array([[allowed]], bool))[0, 0])


def test_dead_experts_are_those_that_might_have_been_chosen() -> None:
    found = report([[[5, 0, 5, 0], [0] * 4], [[10, 0, 0, 0], [0] * 4]], tokens=[10, 0])
    allowed_LME = NAMES.allowed_LME.copy()
    allowed_LME[0, 0, 3] = False  # audio may use it, but has no token
    assert found.dead_LE(allowed_LME).tolist() == [[False, True, False, False], [False, True, True, True]]


def test_shares_and_drops() -> None:
    found = report([[[3, 1, 0, 0], [0] * 4]], tokens=[4, 0], dropped=[[1, 0]])
    assert found.share_LME.tolist() == [[[0.75, 0.25, 0, 0], [0] * 4]]
    assert found.layer_share_LE.tolist() == [[0.75, 0.25, 0, 0]]
    assert found.mean_prob_LME[0, 0].tolist() == [0.375, 0.125, 0, 0] and not found.mean_prob_LME[0, 1].any()
    assert found.dropped_share_LM.tolist() == [[0.2, 0.0]]


def test_reports_add_up_and_survive_json() -> None:
    total = EVEN + report(EVEN.load_LME, dropped=[[1, 2], [3, 4]])
    again = RouterReport.from_dict(json.loads(json.dumps(total.to_dict())))
    for name in ("load_LME", "prob_LME", "dropped_LM", "tokens_M"):
        np.testing.assert_array_equal(getattr(again, name), getattr(total, name))
    assert "dropped" not in EVEN.to_dict() and not RouterReport.from_dict(EVEN.to_dict()).dropped_LM.any()
    names = RoutingNames.from_dict(json.loads(json.dumps(NAMES.to_dict())))
    assert names.experts == NAMES.experts and np.array_equal(names.allowed_LME, NAMES.allowed_LME)


def test_damaged_json_is_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        RoutingNames.from_dict({**NAMES.to_dict(), "experts": ["one"]})
    with pytest.raises(ValueError, match="reshape"):
        RouterReport.from_dict({**EVEN.to_dict(), "prob": [1.0]})
