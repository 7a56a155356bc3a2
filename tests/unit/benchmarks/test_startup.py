from __future__ import annotations

import sys

import pytest

from benchmarks.startup import rows_of, until_first_step


def test_times_end_with_the_first_step() -> None:
    script = "import time; print('data', flush=True); print('step 1/9  loss', flush=True); time.sleep(60)"
    wall, cpu = until_first_step([sys.executable, "-c", script])
    assert 0 <= cpu <= wall + 0.05 < 30


def test_a_command_without_a_step_is_an_error() -> None:
    with pytest.raises(SystemExit, match="did no step:\nno data"):
        until_first_step([sys.executable, "-c", "import sys; print('step 2/9'); sys.exit('no data')"])


def test_ratios_are_of_a_round() -> None:
    rows = rows_of({"run": [(3.0, 2.0), (9.0, 2.2), (4.0, 3.6)], "least": [(2.0, 1.0), (6.0, 2.0), (2.0, 1.2)]})
    ratios = {row.metric: (row.value, row.ok) for row in rows}
    assert ratios == {"time / least": (1.5, True), "CPU time / least": (2.0, False)}
    assert all(row.deviation for row in rows)
