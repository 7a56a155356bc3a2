"""The report as a reader gets it: parsed as HTML, from runs that were trained here."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from routing_cases import EVEN, NAMES, report

from moemm.cli import app
from moemm.config import load_config
from moemm.errors import CheckpointError
from moemm.observe.chart import MAX_POINTS, Chart, thin
from moemm.observe.colour import as_hex, ink, level, side
from moemm.observe.history import History
from moemm.observe.page import Cell, table
from moemm.observe.report import build_report, read_missing, read_summary
from moemm.observe.sections import conflict_section, heatmap_section, scores_section, time_section
from moemm.testing.tiny import tiny_config
from moemm.train import load_outline, load_run, train

VOID = {"meta", "link", "img", "br", "input", "hr"}
ODD = "<b>\"&'x"


class Page(HTMLParser):
    """Headings, tables (rows of cells), texts and addresses; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name) for name, _ in attrs]
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "data", "action", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[list[str]]:
        """The table whose first cell says so."""
        return next(one for one in self.tables if one[0][0] == first)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of the tiny data."""
    import os

    place, before = tmp_path_factory.mktemp("tiny"), dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        train(tiny_config(place, train={"output": str(place / "run"), "steps": 12, "eval_every": 4, "log_every": 2,
                                        "batch_size": 8}))  # fmt: skip
        yield place / "run"
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the run to spoil."""
    shutil.copytree(folder, tmp_path / "run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["root"] = str(folder.parent)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run"


SECTIONS = [
    "Scores", "Who may use which expert", "Which modality uses which routed expert", "Routing over time",
    "Curves of each task", "With modalities missing", "What each modality costs",
    "What each task loses without an expert",
]  # fmt: skip


def test_everything_is_in_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["report", str(folder)]) == 0
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "report.html" in capsys.readouterr().out
    page = Page(html)
    assert [one for one in page.headings if one in SECTIONS] == SECTIONS
    assert page.addresses and all(address.startswith("#") for address in page.addresses)
    assert not page.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html)
    assert not [name for _, name in page.attributes if name.startswith("on")]
    summary = json.loads((folder / "summary.json").read_text())
    for name, task in summary["tasks"].items():
        (row,) = [row for row in page.table("task") if row[0] == name]
        assert row[2:4] == [f"{task['val']:.3f}", f"{task['test']:.3f}"]
    assert summary["config_hash"] in page.text and summary["versions"]["torch"] in page.text


def test_its_numbers_are_those_of_the_run(folder: Path) -> None:
    run = load_run(folder)
    page = Page(build_report(run))
    heat = [one for one in page.tables if one[0] == ["modality", "routed_0", "routed_1", "evenness"]]
    assert len(heat) == 2
    for one in heat:
        assert [row[0] for row in one[1:]] == ["image", "record", "series"]
        assert all(abs(int(row[1]) + int(row[2]) - 100) <= 1 for row in one[1:])
    costs = page.table("modality") and next(one for one in page.tables if "of all operations" in one[0])
    shares = [float(row[3].rstrip("%")) for row in costs[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.3) and shares == sorted(shares, reverse=True)
    reuse = page.table("switched off")
    assert [row[0] for row in reuse[1:]] == [expert.id for expert in run.model.map.experts]
    assert {row[0]: row[1:] for row in reuse}["modality_series"][0] == "·", "shapes has no series"
    experts = next(one for one in page.tables if one[0][1] == "shared")
    assert experts[0] == [
        "modality", "shared", "modality_image to modality_series (3, one each)", "routed_0 to routed_1 (2)"
    ]  # fmt: skip
    assert [row[1:] for row in experts[3:]] == [["●", "●", "○"]] * 3
    active = next(one for one in page.tables if one[0][1] == "active")
    assert active[1][1] == f"{run.model.active_parameters('image'):,}"


def test_quick_needs_neither_data_nor_checkpoint(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "checkpoints")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, "data": {**config["data"], "root": "/nowhere"}}))
    assert app.main(["report", str(copy), "--quick", "--output", str(copy / "deep" / "r.html")]) == 0
    page = Page((copy / "deep" / "r.html").read_text())
    assert [one for one in page.headings if one in SECTIONS] == SECTIONS[:5] and "--quick" in page.text
    assert app.main(["report", str(copy)]) != 0


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    folder = odd_run(tmp_path)
    html = build_report(load_run(folder))
    page = Page(html)
    assert "b" not in page.tags and "<b>" not in html and "<i>" not in html
    assert ODD in page.headings[0] and ODD in [row[0] for row in page.table("task")]
    assert {ODD, "<i>_0", "<i>_1"} <= {row[0] for row in page.table("switched off")}


def odd_run(place: Path) -> Path:
    """A run whose name, task and experts have odd names (those of modalities are checked when data is read)."""
    groups = [{"kind": "shared", "width": 8, "id": ODD}, {"kind": "routed", "count": 2, "width": 8, "id": "<i>"}]
    loaded = tiny_config(
        place,
        data={"tasks": [{"name": ODD, "file": "tones.h5"}]},
        model={"dim": 16, "heads": 2, "layers": 1, "experts": {"groups": groups}},
        train={"output": str(place / "run"), "steps": 2, "batch_size": 8, "baselines": False},
    )
    config = yaml.safe_load(loaded.path.read_text())
    data = {"root": str(place), "num_workers": 0, **config["data"]}
    loaded.path.write_text(yaml.safe_dump({**config, "name": ODD, "data": data}))
    train(load_config(loaded.path))
    return place / "run"


def test_scores_with_modalities_missing_are_read_where_evaluate_left_them(copy: Path) -> None:
    (copy / "missing.csv").write_text(
        "task,split,metric,present,count,value,n\nshapes,val,accuracy,image,1,0.9,24\n"
        "shapes,test,accuracy,image+record,2,0.75,24\nshapes,test,accuracy,image,1,0.123,24\n"
        "shapes,test,accuracy,record,1,,0\n"
    )
    found = read_missing(copy / "missing.csv", "test")
    assert found == {"shapes": {("image", "record"): 0.75, ("image",): 0.123, ("record",): None}}
    page = Page(build_report(load_run(copy)))
    shapes = next(one for one in page.tables if one[0] == ["modality", "alone", "without", "loses"])
    assert shapes[1:] == [["image", "0.123", "-", "-"], ["record", "-", "0.123", "+0.627"], ["all", "", "0.750", ""]]
    assert "shapes (accuracy)" in page.headings


@pytest.mark.parametrize(
    "text", ["task,split\nshapes,test\n", "task,split,metric,present,count,value,n\nx,test,a,b,2,1,1\n"]
)
def test_a_csv_that_is_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "missing.csv").write_text(text)
    with pytest.raises(CheckpointError, match="delete it"):
        read_missing(tmp_path / "missing.csv", "test")


def test_errors_say_what_to_do(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def failure(*arguments: str) -> str:
        assert app.main(["report", *arguments]) == CheckpointError.exit_code
        return capsys.readouterr().err

    assert "no such run folder" in failure(str(copy.parent / "rum"))
    assert "is a folder" in failure(str(copy), "--quick", "--output", str(copy))
    assert "cannot write" in failure(str(copy), "--quick", "--output", str(copy / "config.yaml" / "x.html"))
    (copy / "metrics.jsonl").write_text('{"event": "train"}\n')
    assert "metrics.jsonl cannot be read" in failure(str(copy), "--quick")
    (copy / "catalogue.json").write_text('{"tasks": 3, "modalities": []}')
    assert "does not describe" in failure(str(copy), "--quick")
    (copy / "summary.json").write_text("{}")
    assert "lacks name, tasks" in failure(str(copy))
    (copy / "summary.json").write_text("[")
    assert "cannot be read" in failure(str(copy))
    (copy / "summary.json").unlink()
    assert "has not finished" in failure(str(copy)) and "--resume" in failure(str(copy))


def test_a_summary_of_an_older_version_has_no_commit(copy: Path) -> None:
    summary = read_summary(copy)
    del summary["commit"]
    (copy / "summary.json").write_text(json.dumps(summary))
    assert "not recorded" in build_report(load_outline(copy), quick=True)


def test_a_dense_model_has_no_routing(tmp_path: Path) -> None:
    model = {"dim": 16, "heads": 2, "layers": 1, "moe": "dense"}
    train(tiny_config(tmp_path, model=model, train={"output": str(tmp_path / "run"), "steps": 2, "batch_size": 8,
                                                    "baselines": False}))  # fmt: skip
    page = Page(build_report(load_run(tmp_path / "run")))
    assert [one for one in page.headings if one in SECTIONS] == [*SECTIONS[:2], *SECTIONS[4:7]]
    assert "dense" in page.text


def test_warnings_of_the_run_stand_at_the_top(copy: Path) -> None:
    with (copy / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "message", "text": "step 3  warning: layer 1: image keeps to routed_0"}) + "\n")
        file.write('{"event": "train", "cut sho')
    page = Page(build_report(load_outline(copy), quick=True))
    assert "What stands out" in page.headings and "image keeps to routed_0" in page.text


def history(**changes: Any) -> History:
    collapsed = report([[[400, 0, 0, 0], [100] * 4], [[100, 100, 200, 0], [400, 0, 0, 0]]])
    return History(routing=[(10, EVEN), (20, EVEN), (30, collapsed)], names=NAMES, **changes)


def test_heat_maps_show_the_end_of_the_run() -> None:
    page = Page(heatmap_section(NAMES, history()).body)
    first, second = page.tables
    assert first[1] == ["image", "100", "0", "0", "0", "0.00"] and first[2][5] == "1.00"
    assert second[2] == ["audio", "100", "·", "·", "·", "-"]


def test_time_tables_mark_dead_experts() -> None:
    page = Page(time_section(NAMES, history()).body)
    load_1, load_3, even_1, even_3 = page.tables
    assert load_1[0] == ["expert, up to step", "10", "20", "30"] and load_1[1] == ["routed_0", "25", "25", "62"]
    assert load_3[4] == ["routed_3", "12", "12", "✕"]
    assert even_1[1] == ["image", "1.00", "1.00", "0.00"] and [row[0] for row in even_3] == [
        "modality, up to step",
        "image",
    ]


def test_charts_are_thinned_and_leave_out_what_is_no_number() -> None:
    points = [(float(x), 1.0) for x in range(1000)]
    assert len(thin(points)) <= MAX_POINTS and thin(points)[0] == (3.0, 1.0)
    assert thin([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]
    assert "nothing recorded" in Chart(title="<t>", points=[], xlabel="x").svg()
    svg = Chart(title="<t>", points=[(1.0, 5.0)], xlabel="x", level=(4.0, "l")).svg()
    assert "&lt;t&gt;" in svg and "<circle" in svg and 'class="two"' in svg and "nan" not in svg


@pytest.mark.parametrize("scale", [level, side])
def test_text_on_every_colour_can_be_read(scale: Any) -> None:
    def luminance(colour: tuple[int, int, int]) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    values = [number / 50 for number in range(-50, 51)] if scale is side else [number / 100 for number in range(101)]
    for value in values:
        dark, light = sorted([luminance(scale(value)), luminance(ink(scale(value)))])
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert scale(7.0) == scale(1.0) and as_hex((1, 2, 255)) == "#0102ff"
    lightness = [luminance(level(number / 20)) for number in range(21)]
    assert lightness == sorted(lightness, reverse=True)


def test_cells_escape_text_and_titles() -> None:
    html = table([ODD, ODD], [(ODD, [Cell(text=ODD, title=ODD, bar=2.0)])], label=ODD)
    assert "<b>" not in html and Page(html).tables == [[[ODD, ODD], [ODD, ODD]]]


def test_without_baselines_there_are_no_columns_for_them() -> None:
    task = {"metric": "accuracy", "val": 0.5, "test": 0.6, "n": 10}
    for baseline, columns in ((None, 5), ({"model": "logistic", "val": 0.4, "test": 0.5}, 7)):
        section = scores_section({"tasks": {"a": {**task, "baseline": baseline}}}, [], None)
        (rows,) = Page(section.body).tables
        assert {len(row) for row in rows} == {columns}
        assert ("scikit-learn" in section.lead) == (columns == 7)


def test_conflicts_are_listed_by_how_often_losses_oppose_each_other(tmp_path: Path) -> None:
    lines = [
        {"event": "train", "step": step, "losses": {}, "conflict": {"a | b": [0.2, 0.1], f"a | {ODD}": [-0.3, 0.75]}}
        for step in (1, 2)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(conflict_section(History.read(path)).body)
    assert page.tables[0][1:] == [
        [f"a | {ODD}", "-0.300", "75%", "-0.300", "75%"],
        ["a | b", "+0.200", "10%", "+0.200", "10%"],
    ]
    assert page.headings == [f"a | {ODD}", "a | b"]
