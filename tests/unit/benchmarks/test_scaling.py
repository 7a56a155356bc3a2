"""The rows that benchmarks.scaling makes of what the ranks measured."""

from __future__ import annotations

import pytest

from benchmarks import scaling


def test_a_case_has_the_ratio_of_its_own_rounds_and_the_bytes_of_rank_0() -> None:
    first = {"seconds": 0.2, "bytes": {"all_reduce": 2e6, "all_to_all": 5e5}, "rows": [1, 1, 1, 1]}
    second = {"seconds": 0.3, "bytes": {"all_reduce": 2e6, "all_to_all": 6e5}, "rows": [1, 1, 1, 1]}
    plan = {"all_reduce": 1_900_000, "all_to_all": 600_000}
    other = {"seconds": 9.0, "bytes": {"all_reduce": 2e6}, "rows": [1, 1, 1, 1]}
    rows = scaling.rows_of((2, 1, 2), [[first, other], [second, other]], [0.1, 0.2], plan)
    found = {row.metric: row.value for row in rows}
    assert {row.case for row in rows} == {"2 ranks, ZeRO 1, ep 2"}
    assert found["step / 1 rank"] == pytest.approx(1.75) and found["step"] == pytest.approx(250.0)
    assert (found["all_reduce"], found["all_to_all"], found["broadcast"], found["all kinds"]) == (2.0, 0.5, 0.0, 2.5)
    assert found["planned"] == 2.5 and found["planned, off"] == pytest.approx(0.05), "what routing decides is left out"
    off = found["all_to_all, planned for what went, off"]
    assert off == pytest.approx(1 - scaling.planned_for((2, 1, 2), [[1, 1, 1, 1]] * 2) / 5e5)


def test_bytes_of_what_went() -> None:
    shape, _ = scaling.layout_of((2, 1, 2))
    forward = 2 * shape.model.dim * 4 + 8 * 2  # there and back, with two slots of two numbers
    rows = [[10, 20, 30, 40], [30, 20, 10, 0]]  # of two layers in two steps
    expected = 160 * 2 * forward / scaling.COUNTED + len(shape.layers) * 2 * 2 * 8
    assert scaling.planned_for((2, 1, 2), rows) == expected


def test_the_planner_knows_every_case() -> None:
    for case in scaling.CASES:
        assert (scaling.planned(case).get("all_to_all", 0) > 0) == (case[2] > 1)


def test_a_kind_that_has_no_column_is_not_left_out_in_silence() -> None:
    with pytest.raises(AssertionError, match="gossip"):
        scaling.rows_of((2, 0, 1), [[{"seconds": 1.0, "bytes": {"gossip": 1.0}}]], [1.0], {})
