"""Every subset of modalities: which are scored, their mean, and what is written."""

from __future__ import annotations

import csv
import io
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from moemm.data import build_catalogue
from moemm.errors import ConfigError
from moemm.evaluate import evaluate_run, render, subsets_csv
from moemm.evaluate.missing import MAX_WHOLE, NUM_DRAWN, mean_over_subsets, subsets
from moemm.modalities import fit_modalities
from moemm.models import build_model
from moemm.observe.plots import missing_figure, save_figure
from moemm.testing.tiny import tiny_config
from moemm.train.setup import train_values

NAMES = tuple("abcdefghijkl")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    loaded = tiny_config(tmp_path_factory.mktemp("tiny"))
    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    specs = fit_modalities(catalogue.modalities, {}, lambda name: train_values(catalogue, name))
    torch.manual_seed(0)
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks).eval()
    torch.nn.init.normal_(model.heads.linear["shapes"].weight)
    return SimpleNamespace(model=model, catalogue=catalogue, specs=specs, folder=Path("runs/x"), step=7)


@pytest.mark.parametrize("count", range(1, MAX_WHOLE + 1))
def test_all_subsets_of_few_modalities(count: int) -> None:
    found = subsets(NAMES[:count])
    assert len(found) == len(set(found)) == 2**count - 1
    assert found[0] == NAMES[:count] and found[-1] == (NAMES[count - 1],)


@pytest.mark.parametrize("count", [MAX_WHOLE + 1, 9, 12])
def test_many_modalities_are_sampled_the_same_everywhere(count: int) -> None:
    names = NAMES[:count]
    found = subsets(names)
    assert len(found) == len(set(found)) == 2 * count + 1 + NUM_DRAWN
    for size in (1, count - 1, count):
        assert set(combinations(names, size)) <= set(found)
    assert found == subsets(names)
    assert [len(one) for one in found] == sorted((len(one) for one in found), reverse=True)
    assert all(list(one) == sorted(one) for one in found)


def test_the_mean_of_all_and_the_estimate_from_some() -> None:
    few = {one: float(len(one)) for one in subsets(NAMES[:3])}
    assert mean_over_subsets(few, 3) == pytest.approx((3 + 2 * 3 + 3) / 7)
    many = {one: float(len(one)) for one in subsets(NAMES[:9])}
    whole = sum(len(one) for size in range(1, 10) for one in combinations(NAMES[:9], size)) / 511
    assert mean_over_subsets(many, 9) == pytest.approx(whole), "a score that depends on the size alone: exact"
    assert mean_over_subsets({("a",): 0.5, ("b",): None}, 2) == 0.5
    assert mean_over_subsets({("a",): None}, 1) is None


def test_each_subset_has_the_score_of_what_it_leaves(run: Any) -> None:
    result = evaluate_run(run, missing="all")
    shapes = result["tasks"]["shapes"]
    scores = {tuple(row["present"]): row for row in shapes["subsets"]}
    assert set(scores) == {("image", "record"), ("image",), ("record",)}
    for present, drop in ((("image",), ["record"]), (("record",), ["image"])):
        alone = evaluate_run(run, missing=drop)["tasks"]["shapes"]
        assert (scores[present]["value"], scores[present]["n"]) == (alone["value"], alone["n"])
    complete = evaluate_run(run)["tasks"]["shapes"]
    assert shapes["complete"] == scores["image", "record"]["value"] == complete["value"]
    assert scores["record",]["n"] < complete["n"], "a third of the samples lacks its record"
    assert shapes["mean"] == pytest.approx(sum(row["value"] for row in scores.values()) / 3)
    assert result["tasks"]["tones"]["subsets"][0]["present"] == ["series"] and not shapes["sampled"]


def test_the_table_fits_and_the_csv_holds_every_score(run: Any) -> None:
    result = evaluate_run(run, missing="all", split="val")
    rows = list(csv.DictReader(io.StringIO(subsets_csv(result))))
    assert [row["present"] for row in rows] == ["image+record", "image", "record", "series"]
    assert float(rows[1]["value"]) == result["tasks"]["shapes"]["subsets"][1]["value"]
    assert {row["split"] for row in rows} == {"val"} and [row["count"] for row in rows] == ["2", "1", "1", "1"]
    text = printed(result)
    assert "mean over 3 subsets" in text and "less complete" in text


def wide_result() -> dict[str, Any]:
    names = [f"modality_{letter}" for letter in NAMES[:8]]
    rows = [{"present": list(one), "value": 0.1 * len(one), "n": 100} for one in subsets(names)]
    rows[-1]["value"] = None
    values = {tuple(row["present"]): row["value"] for row in rows}
    task = {
        "metric": "accuracy", "modalities": names, "mean": mean_over_subsets(values, 8), "complete": 0.8,
        "sampled": True, "subsets": rows,
    }  # fmt: skip
    return {"run": "runs/x", "step": 1, "split": "test", "missing": "all", "tasks": {"wide": task}}


def printed(result: dict[str, Any]) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(render(result))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_drawn_subsets_are_one_line_a_size() -> None:
    text = printed(wide_result())
    assert "4 of 8, mean of 16 drawn" in text and "mean over 255 subsets (est.)" in text and "no score" in text
    assert len(text.splitlines()) < 35


def test_figures_are_written_twice_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written = save_figure(missing_figure(wide_result()), tmp_path / name)
        assert [path.name for path in written] == [f"{name}.png", f"{name}.svg"]
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert "</svg>" in (tmp_path / "one.svg").read_text()


def test_the_figure_shows_each_score_and_leaves_single_modalities_out(run: Any) -> None:
    figure = missing_figure(evaluate_run(run, missing="all"))
    assert [text.get_text() for text in figure.texts] == ["shapes"]
    sets, scores = figure.axes
    assert [label.get_text() for label in sets.get_xticklabels()] == ["image", "record"]
    assert len(scores.patches) == 3


def test_all_is_no_modality_among_others(run: Any) -> None:
    with pytest.raises(ConfigError, match="--missing all: no such modality"):
        evaluate_run(run, missing=["all", "image"])
