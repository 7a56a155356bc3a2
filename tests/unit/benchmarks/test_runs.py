"""What benchmarks that train share: the rows, the runs in processes of their own, and the core tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import heterogeneity, pretraining, recipes, runs
from moemm.config import load_config


def summary(**metrics: str) -> runs.Summary:
    """A summary whose tasks' scores are 0.5, 0.6 ..."""
    tasks = {name: {"metric": metric, "test": 0.5 + 0.1 * n} for n, (name, metric) in enumerate(metrics.items())}
    return {"tasks": tasks, "seconds": 1.0}


def test_a_row_is_the_mean_and_the_sample_deviation() -> None:
    row = runs.row("c", "m", [0.2, 0.4], target=0.35)
    assert row.value == pytest.approx(0.3) and row.deviation == pytest.approx(0.02**0.5) and row.ok is False
    assert runs.row("c", "m", [0.2]).deviation is None


def test_the_mean_score_takes_no_score_that_is_better_when_lower() -> None:
    assert runs.mean_score(summary(a="accuracy", b="auc")) == pytest.approx(0.55)
    with pytest.raises(SystemExit, match="rmse"):
        runs.mean_score(summary(a="accuracy", b="rmse"))


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary(a="accuracy")))
    assert runs.train(tmp_path, "no such file")["tasks"]["a"]["test"] == 0.5


def test_a_run_that_fails_shows_its_end(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)moemm train .*nothing\.yaml ended with 2:.*nothing\.yaml"):
        runs.train(tmp_path / "run", str(tmp_path / "nothing.yaml"))


def test_the_suite_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOEMM_SUITE", raising=False)
    with pytest.raises(SystemExit, match="MOEMM_SUITE"):
        runs.suite()
    monkeypatch.setenv("MOEMM_SUITE", str(tmp_path))
    assert runs.suite() == tmp_path.resolve()


def test_the_three_benchmarks_of_the_core_tasks_train_the_same_ones(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEMM_SUITE", str(tmp_path))
    core = yaml.safe_load(runs.CORE.read_text(encoding="utf-8"))
    values = pretraining.config(tmp_path, tmp_path / "p", seed=0, steps=1, objectives=pretraining.OBJECTIVES)
    paths = [runs.write_config(tmp_path / "p.yaml", values)]
    paths.append(recipes.config("moemm", tmp_path, suite=tmp_path, steps=1, seed=0))
    loaded = [heterogeneity.recipe(tmp_path, steps=1), *map(load_config, paths)]
    for one in loaded:
        assert [task.name for task in one.config.data.tasks] == [task["name"] for task in core["data"]["tasks"]]
        assert one.config.data.tasks == loaded[0].config.data.tasks
        assert one.config.modalities["picture"] == loaded[0].config.modalities["picture"]
