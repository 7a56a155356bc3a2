"""The benchmark of growth: which steps count, what is compared with what, and that its options exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import growth_extend, growth_upcycle, runs
from benchmarks.growth_extend import MOEXTEND, NEAREST, RANDOM, WORST, Extended, Result
from benchmarks.growth_upcycle import CONTINUED, FURTHER, GAIN, LOSS, MOEMM, SUNK, Curve, rows_of
from benchmarks.record import Row
from moemm.config import load_config


def falling(steps: int, first: float, per_step: float, score: float = 0.5) -> Curve:
    at = list(range(10, steps + 1, 10))
    return Curve(at, [first - per_step * step for step in at], score)


def table(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(one.case, one.metric): one for one in rows}


def test_a_loss_is_reached_where_the_mean_of_a_window_is_as_low() -> None:
    curve = falling(300, 3.0, 0.01)
    assert curve.last() == pytest.approx(3.0 - 0.01 * 280)
    assert curve.reaches(3.0 - 0.01 * 100) == 120, "the window of 80 to 120 has its mean at 100"
    assert curve.reaches(3.0 - 0.01 * 100, after=100) == 50, "the first window behind step 100"
    assert curve.reaches(-1.0) is None


def test_steps_that_were_made_before_count_and_seeds_that_never_arrive_are_told() -> None:
    whole = falling(600, 6.0, 0.01)
    fast, slow, never = falling(300, 2.99, 0.02), falling(300, 3.0, 0.005), falling(300, 9.0, 0.0)
    branch, anew = falling(200, 2.99, 0.02), "copy, fresh optimizer"
    kept = Curve([step + 300 for step in fast.steps], fast.losses, fast.score)
    found = [{CONTINUED: whole, "copy": kept, anew: fast, "branch": branch, "moemm from scratch": whole}] * 2
    found = [{**found[0], f"{MOEMM}, fresh optimizer": one} for one in (slow, never)]
    rows = table(rows_of(found))
    assert rows[CONTINUED, FURTHER].value == 300 and rows[CONTINUED, SUNK].value == 600
    for case in ("copy", anew):
        assert rows[case, FURTHER].value == 160 and rows[case, SUNK].value == 460
    assert rows["copy", FURTHER].ok and rows[anew, FURTHER].target is None, "a control is held to nothing"
    assert rows["branch", FURTHER].value == 160 + 3 * growth_upcycle.BRANCH_STEPS
    assert ("moemm from scratch", FURTHER) not in rows and rows["moemm from scratch", SUNK].value == 600
    slow_row = rows[f"{MOEMM}, fresh optimizer", FURTHER]
    assert slow_row.value is None and slow_row.note == "0 of 2 seeds got there"
    assert rows["copy", LOSS].better == "lower" and rows["copy", GAIN].value == 0.0


def test_an_extension_is_held_to_the_joint_run_of_its_seed() -> None:
    def way(score: float, forgotten: float = 0.0, moved: int = 0) -> Extended:
        return Extended(score, 10.0, 0.1, forgotten, moved, {})

    ways = {NEAREST: way(0.9), RANDOM: way(0.8), WORST: way(0.7), MOEXTEND: way(0.9, 2.0, 7)}
    sources = {"a": (0.1, 0.9), "b": (0.2, 0.8), "c": (0.3, 0.85)}
    rows = table(growth_extend.rows_of({"watch": [Result(1.0, 100.0, ways, sources)] * 2}))
    nearest = f"watch: {NEAREST}"
    assert (
        rows[nearest, growth_extend.SHARE].value == pytest.approx(0.9)
        and rows[nearest, growth_extend.SHARE].ok is False
    )
    assert rows[nearest, growth_extend.TIME].value == pytest.approx(0.1) and rows[nearest, growth_extend.TIME].ok
    assert (
        rows[nearest, growth_extend.FORGOTTEN].ok and rows[f"watch: {MOEXTEND}", growth_extend.FORGOTTEN].value == 2.0
    )
    assert rows[nearest, growth_extend.OVER_RANDOM].value == pytest.approx(0.1)
    assert rows[nearest, growth_extend.RANKS].value == pytest.approx(0.5), "low bits, high score"


def test_branches_share_out_the_core_tasks_and_new_tasks_are_known(tmp_path: Path) -> None:
    core = set(growth_extend.core_tasks())
    assert {name for third in growth_upcycle.THIRDS for name in third} == core - {"news"}
    assert set(growth_extend.OPTIONS) == set(growth_extend.TASKS) <= core


@pytest.mark.parametrize("recipe", ["dense", "moemm"])
def test_what_is_trained_is_a_configuration(recipe: str, tmp_path: Path) -> None:
    output = tmp_path / "run"
    section = growth_upcycle.train_section(output, steps=300, seed=1)
    file = Path(runs.ROOT / "configs" / "recipes" / f"{recipe}.yaml")
    values = {"base": [str(file), str(runs.CORE)], "train": section}
    loaded = load_config(runs.write_config(tmp_path / "run.yaml", values), runs.overrides("train", {"steps": 20}))
    assert loaded.config.train.steps == 20 and loaded.config.train.min_lr == 1.0
    assert loaded.config.train.output == str(output)


def test_overrides_are_options_of_train() -> None:
    given = {"output": "a/b", "epochs": None, "baselines": False, "lr": 0.1, "checkpoint": {"every": 0}}
    assert runs.overrides("train", given) == [
        "--train.output=a/b", "--train.epochs=null", "--train.baselines=false", "--train.lr=0.1",
        "--train.checkpoint.every=0",
    ]  # fmt: skip
