"""Verdicts are computed, files are whole, and the tables in the docs are those of the files."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import record, tables
from benchmarks.record import Matrix, Row


@pytest.mark.parametrize(
    ("value", "better", "target", "ok"),
    [
        (0.9, "higher", 0.8, True),
        (0.7, "higher", 0.8, False),
        (0.8, "higher", 0.8, True),
        (1.1, "lower", 1.0, False),
        (1.0, "lower", 1.0, True),
        (None, "lower", 1.0, None),
        (0.5, "higher", None, None),
    ],
)
def test_the_verdict_follows_from_value_direction_and_target(value, better, target, ok) -> None:
    assert Row(case="c", metric="m", value=value, better=better, target=target).ok is ok
    assert Row(case="c", metric="m", value=value, better=better, target=target, ok=not ok).ok is ok


def test_a_result_names_command_machine_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.orig_argv", ["/usr/bin/python", "-m", "benchmarks.some", "--folder", str(tmp_path)])
    path = record.write("some", [Row(case="c", metric="m", value=1.0)], seeds=[0, 1], seconds=2.0)
    result = json.loads(path.read_text())
    assert result["name"] == "some" and result["seeds"] == [0, 1]
    assert {"cpu", "cores", "gpu", "memory"} == set(result["machine"])
    assert result["versions"]["torch"] and result["commit"] and result["command"].startswith("python")
    assert str(Path(record.__file__).parents[1]) not in path.read_text(), "no path of this machine"
    assert result["command"] == "python -m benchmarks.some --folder FOLDER"


def test_a_part_that_is_measured_anew_replaces_its_rows_and_the_others_keep_theirs_and_their_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)

    def measure(values: dict[str, float], commit: str) -> dict:
        monkeypatch.setattr(record, "_commit", lambda: commit)
        kept = record.keep("some", values, lambda row: row["metric"][0])
        rows = [Row(case="c", metric=f"{part}: m", value=value) for part, value in values.items()]
        matrices = [Matrix(title=part, columns={"m": f"{part}: m"}) for part in values]
        path = record.write("some", rows, seeds=[0], seconds=1.0, matrices=matrices, kept=kept)
        return json.loads(path.read_text())

    assert "earlier" not in measure({"a": 1.0, "b": 2.0}, "first")
    measure({"c": 3.0}, "second")
    result = measure({"b": 4.0}, "third")
    assert {row["metric"]: row["value"] for row in result["rows"]} == {"a: m": 1.0, "c: m": 3.0, "b: m": 4.0}
    assert [matrix["title"] for matrix in result["matrices"]] == ["a", "c", "b"]
    assert (result["of"], result["commit"]) == (["b"], "third")
    assert [(run["of"], run["commit"]) for run in result["earlier"]] == [(["a"], "first"), (["c"], "second")]
    told = tables.markdown(result).splitlines()
    assert [line.partition(": ")[0] for line in told if "torch" in line] == ["a", "c", "b"]
    assert "earlier" not in measure({"a": 5.0, "b": 5.0, "c": 5.0}, "fourth")


def test_a_result_that_is_not_there_names_its_command() -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.nothing"):
        record.read("nothing")


def test_results_that_lie_beside_it_do_not_make_a_commit_dirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    files = [results / "faults.json", tmp_path / "model.py"]
    for path in files:
        path.write_text("a")
    for command in ("init -q", "add .", "-c user.name=a -c user.email=a@b commit -qm a"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "RESULTS", results)
    clean = record._commit()
    files[0].write_text("b")
    assert re.fullmatch("[0-9a-f]{7,}", clean) and record._commit() == clean
    files[1].write_text("b")
    assert record._commit() == f"{clean}-dirty"


def test_committed_results_have_the_agreed_form() -> None:
    for path in record.RESULTS.glob("*.json"):
        result = json.loads(path.read_text())
        assert result["name"] == path.stem
        for row in result["rows"]:
            assert row["ok"] is record.reaches(row["value"], better=row["better"], target=row["target"]), row


@pytest.mark.parametrize("path", tables.documents(), ids=lambda path: path.name)
def test_tables_in_the_docs_are_those_of_the_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text, "make them anew: python -m benchmarks.tables --docs"


def test_recipes_tell_what_they_scored() -> None:
    result = json.loads((record.RESULTS / "recipes.json").read_text())
    scores = {row["case"]: row for row in result["rows"] if row["metric"] == "mean of tasks"}
    folder = Path(record.__file__).parents[1] / "configs" / "recipes"
    told = {path.stem: path.read_text() for path in folder.glob("*.yaml") if path.stem in scores}
    assert len(told) >= 11
    for name, text in told.items():
        mean, deviation = (f"{scores[name][key]:.3f}".removeprefix("0") for key in ("value", "deviation"))
        assert f"#   scored    {mean} ± {deviation} (" in text, name
        assert name == "dense" or f"dense {scores['dense']['value']:.3f}".replace(" 0", " ") in text, name
