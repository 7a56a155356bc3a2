"""NaN and Inf: a few of the cases of benchmarks/faults/values.py, which `make soak` tries all of."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults import values
from moemm.testing.forked import Nursery


def test_what_is_not_finite_costs_its_modality_its_share_of_the_step(nursery: Nursery, tmp_path: Path) -> None:
    outcome = values.run(nursery, tmp_path, 4)
    assert outcome.wrong == [] and outcome.count == 4


def test_too_many_in_a_row_end_it_and_nothing_is_saved(nursery: Nursery, tmp_path: Path) -> None:
    arguments = {"folder": str(tmp_path), "stage": 2}
    for rank in nursery.run("benchmarks.faults.values:job_of_many", arguments=arguments, check=True):
        assert rank.value["step"] == 4 and rank.value["events"] == 2 and rank.value["finite"]
        assert "The loss of step 5 is not finite" in rank.value["error"]
        assert "has an infinite value in modality image" in rank.value["error"]
        assert "3 steps in a row were faulty (train.health.max_faulty)" in rank.value["error"]
    assert not list((tmp_path / "many_2").glob("checkpoints/step_*"))
