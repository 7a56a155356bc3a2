"""The benchmark of what harmonizing costs: each way that it times takes a step, TorchJD's too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harmonize import PEER, TRUNK, measure


@pytest.mark.usefixtures("alone")
def test_every_way_is_timed(tmp_path: Path) -> None:
    rows, seconds = measure(tmp_path, 2, 1)
    timed = {row.case for row in rows if row.metric == "CPU time / plain sum"}
    assert {f"2 losses, {way}" for way in ("upgrad a sample", "realign a sample", TRUNK, PEER)} <= timed
    assert seconds > 0.0 and all(row.value is not None for row in rows)
