from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from routing_cases import EVEN, NAMES, report

from moemm.observe.console import ConsoleWriter
from moemm.observe.jsonl import JsonLines
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.routing import RouterReport, RoutingNames
from moemm.observe.span import duration
from moemm.observe.table import number, results_table
from moemm.train.callbacks import JsonLinesCallback

INFO = RunInfo(
    name="r", folder="f", tasks=("digits", "a[b]"), modalities=("image",), start_step=0, total_steps=10,
    facts={"run": "r -> f"},
)  # fmt: skip
SUMMARY = {
    "name": "r",
    "steps": 10,
    "seconds": 75.0,
    "tasks": {
        "digits": {"metric": "accuracy", "val": 0.91, "test": 0.9, "n": 40, "baseline": {"test": 0.8}},
        "price": {"metric": "rmse", "val": 2.0, "test": None, "n": 0, "baseline": None},
    },
}


def metrics(step: int) -> Metrics:
    return Metrics(
        step=step, total_steps=10, loss=1.5, router_loss=0.1, losses={"digits": 1.25}, accuracy={"digits": 0.5},
        lr=1e-3, grad_norm=None, tokens_per_second=12345.0, seconds=3.0, seconds_left=65.0, routing=EVEN,
    )  # fmt: skip


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def text_of(target: Console) -> str:
    assert isinstance(target.file, io.StringIO)
    return target.file.getvalue()


def test_plain_lines_where_it_is_no_terminal() -> None:
    target = console(terminal=False)
    writer = ConsoleWriter(INFO, target)
    writer.start()
    writer.advance(1)
    writer.metrics(metrics(2))
    writer.scores(4, "val", {"digits": {"metric": "accuracy", "value": 0.5, "n": 3}})
    writer.message("saved [bold]")
    writer.results(SUMMARY)
    lines = text_of(target).splitlines()
    assert lines[0].split() == ["run", "r", "->", "f"]
    assert lines[1] == "step 2/10  loss 1.5000  digits 1.250  12,345 tokens/s  1 min 05 s left"
    assert lines[2] == "step 4  val  digits accuracy 0.500"
    assert lines[3] == "saved [bold]", "markup of a message is shown as it is"
    assert "\x1b" not in text_of(target)


def test_panel_on_a_terminal_shows_tasks_and_goes_away() -> None:
    target = console(terminal=True)
    writer = ConsoleWriter(INFO, target)
    writer.start()
    writer.metrics(metrics(2))
    writer.advance(3)
    writer.scores(3, "val", {"digits": {"metric": "accuracy", "value": 0.75, "n": 3}})
    writer.close()
    text = text_of(target)
    assert "digits" in text and "a[b]" in text and "0.750" in text and "12,345 tokens/s" in text
    writer.close()


def test_table_has_metric_val_test_and_baseline() -> None:
    target = console(terminal=False)
    target.print(results_table(SUMMARY))
    text = text_of(target)
    assert "r: 10 steps in 1 min 15 s" in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert rows == [["digits", "accuracy", "0.910", "0.900", "40", "0.800"], ["price", "rmse", "2.000", "-", "0", "-"]]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_number() -> None:
    assert number(None) == "-" and number(0.12345) == "0.123"


def test_jsonl_appends_flushes_and_writes_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": float("nan"), "nested": {"x": (1.0, float("inf"))}})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "nested": {"x": [1.0, None]}}
    lines.close()


def test_jsonl_forgets_what_a_resume_goes_back_behind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"event": "message"}\n{"step": 2}\n{"step": 3}\n{"step": 2, "cut')
    JsonLines(path, after=2).close()
    assert path.read_text() == '{"step": 1}\n{"event": "message"}\n{"step": 2}\n'
    JsonLines(path).close()
    assert path.read_text() == "", "a run from the start begins an empty file"


def test_metrics_as_json_leave_the_routing_to_its_own_lines() -> None:
    values = metrics(2).to_dict()
    assert values["event"] == "train" and "routing" not in values
    json.dumps(values)


def routing_lines(path: Path, *, names: RoutingNames, found: RouterReport, reports: int) -> list[dict[str, Any]]:
    callback = JsonLinesCallback()
    callback.on_start(replace(INFO, folder=str(path), routing=names))
    for step in range(1, reports + 1):
        callback.on_metrics(replace(metrics(step), routing=found))
    callback.on_close()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "routing_names" and sum(line["event"] == "train" for line in lines) == reports
    return [line for line in lines if line["event"] == "routing"]


def test_routing_goes_to_lines_of_its_own(tmp_path: Path) -> None:
    lines = routing_lines(tmp_path, names=NAMES, found=EVEN, reports=2)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["load"] == EVEN.load_LME.tolist() and lines[0]["tokens"] == [400, 400]


def test_large_maps_are_added_up_before_they_are_written(tmp_path: Path) -> None:
    load_LME = np.ones((2, 10, 64))  # 1,280 numbers: every third report, and the last one, step 10
    names = RoutingNames(
        layers=(0, 1), rows=tuple("abcdefghij"), experts=tuple(map(str, range(64))), allowed_LME=load_LME > 0
    )
    lines = routing_lines(tmp_path, names=names, found=report(load_LME), reports=10)
    assert [(line["step"], line["load"][0][0][0]) for line in lines] == [(3, 3), (6, 3), (9, 3), (10, 1)]
