"""The benchmark of proposed splits: what it counts, and that its trunks are those it says."""

from __future__ import annotations

from benchmarks.conflict_split import EVERYWHERE, PROPOSED, SHARED, TRUNKS, Found, rows_of


def test_a_split_is_held_to_the_run_it_was_proposed_for() -> None:
    none = Found(100, 10, 0, {SHARED: 0.5, EVERYWHERE: 0.6})
    some = Found(100, 30, 4, {SHARED: 0.5, PROPOSED: 0.45, EVERYWHERE: 0.4})
    rows = {(row.case, row.metric): row for row in rows_of({"wide": [none, none], "narrow": [none, some]})}
    assert rows["narrow", "of them under 0"].value == 0.2 and rows["narrow", "conflicts that last"].value == 4
    assert (
        rows["narrow", "runs with a proposal"].value == 0.5 and rows["all trunks", "runs with a proposal"].value == 0.25
    )
    gain = rows[f"narrow: {PROPOSED}", "score less shared"]
    assert round(gain.value or 0.0, 6) == -0.05 and gain.ok is False
    assert (f"wide: {PROPOSED}", "score") not in rows
    assert rows[f"wide: {EVERYWHERE}", "score less shared"].value == 0.6 - 0.5
    assert all(f"dim {trunk['dim']}, width {trunk['width']}" == name for name, trunk in TRUNKS.items())
