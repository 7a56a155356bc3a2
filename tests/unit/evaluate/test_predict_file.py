"""`moemm predict`: what is scored is what is written, in every format, for every kind of target; what is refused."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import moemm
from moemm.cli.app import main
from moemm.data import DataFile, Table, repack_file, validate_file
from moemm.data.given import Matched
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.errors import ConfigError, DataError
from moemm.evaluate import FilePredictions, evaluate_run, render_predictions, summarize, write_predictions
from moemm.evaluate.prediction_file import to_csv, to_jsonl
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train

pytestmark = pytest.mark.usefixtures("alone")
Capture = pytest.CaptureFixture[str]
SPLIT = np.arange(48) % 3


def levels(folder: Path) -> None:
    """levels.h5: a value (`label`) and two marks (`label_marks`) of each image, and an echo that no task reads."""
    random = np.random.default_rng(1)
    value = random.normal(size=48).astype(np.float32)
    images = random.normal(size=(48, 1, 8, 8)).astype(np.float32) + value[:, None, None, None]
    marks = LabelData(values=np.stack([value > 0, value > 0.5], 1).astype(np.uint8), class_names=("high", "top|most"))
    echo = ModalityData(kind="timeseries", values=random.normal(size=(48, 4, 2)).astype(np.float32))
    write_file(
        folder / "levels.h5", task="level", labels={"label": LabelData(values=value), "label_marks": marks},
        split=SPLIT.astype(np.uint8), modalities={"image": ModalityData(kind="image", values=images, layout="CHW"),
                                                  "echo": echo},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`run`, of four tasks, two of which share their samples, and `out`, its export."""
    found, before = tmp_path_factory.mktemp("predicted"), torch.are_deterministic_algorithms_enabled()
    levels(found)
    alike = {"file": "levels.h5", "modalities": ["image"]}
    tasks = [
        {"name": "shapes", "file": "shapes.h5"},
        {"name": "tones", "file": "tones.h5", "rename": {"series": "wave"}},
        {"name": "level", **alike},
        {"name": "marks", "label": "label_marks", **alike},
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        train(
            tiny_config(
                found, data={"root": str(found), "tasks": tasks, "joint_labels": True, "num_workers": 0},
                train={"output": str(found / "run"), "steps": 12, "lr": 1e-2, "baselines": False},
            )
        )  # fmt: skip
    torch.use_deterministic_algorithms(before)
    assert main(["export", str(found / "run"), str(found / "out")]) == 0
    yield found


def predicted(folder: Path, data: str | Path, *arguments: str, model: str = "run", to: str = "found.csv") -> list[Any]:
    """Rows of the CSV file that the verb writes, anew."""
    file = folder / to
    options = ["--data", str(folder / data), "--output", str(file), "--overwrite", *arguments]
    assert main(["predict", str(folder / model), *options]) == 0
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.parametrize("missing", ["", "record"])
def test_the_file_has_the_accuracy_that_evaluate_prints(folder: Path, missing: str, capsys: Capture) -> None:
    arguments = ["--split", "test", *(["--missing", missing] if missing else [])]
    rows = predicted(folder, "shapes.h5", *arguments)
    scored = evaluate_run(load_run(folder / "run"), missing=[missing] if missing else [])["tasks"]["shapes"]
    assert np.mean([row["predicted"] == row["label"] for row in rows]) == scored["value"]
    assert len(rows) == scored["n"] and list(rows[0]) == ["index", "predicted", "probability", "label"]
    assert len({row["predicted"] for row in rows}) > 1 and all(1 / 3 <= float(r["probability"]) <= 1 for r in rows)
    with DataFile(folder / "shapes.h5") as file:
        assert [int(row["index"]) for row in rows] == np.flatnonzero(file.split == 2).tolist()
    printed = capsys.readouterr().out
    assert f"accuracy    {scored['value']:.3f}, by the labels of the file" in printed
    assert f"modalities  image{'; without record' if missing else ', record'}" in printed


def test_outputs_of_every_task_are_those_that_are_scored(folder: Path) -> None:
    """Also of the second of two tasks that share their samples, and of a modality with another name in the file."""
    model = moemm.load(folder / "out")
    scores = evaluate_run(load_run(folder / "run"))["tasks"]
    for task, file in (("tones", "tones.h5"), ("level", "levels.h5"), ("marks", "levels.h5")):
        found = model.predict_file(folder / file, task=task, split="test")
        assert found.metrics()[scores[task]["metric"]] == scores[task]["value"], task
    assert found.matched == Matched({"image": "image"}, (), ("echo",))


def test_a_run_its_checkpoint_and_its_export_say_the_same(folder: Path) -> None:
    checkpoint = next((folder / "run" / "checkpoints").glob("step_*")).relative_to(folder)
    texts = []
    for model in ("run", "out", str(checkpoint)):
        predicted(folder, "tones.h5", model=model)
        texts.append((folder / "found.csv").read_bytes())
    assert texts[0] == texts[1] == texts[2] and texts[0].count(b"\n") == 97


@pytest.fixture(scope="module")
def bare(folder: Path) -> Path:
    """Ten images of shapes.h5 and nothing else, the fourth of them absent."""
    with DataFile(folder / "shapes.h5") as file:
        images = [None if index == 3 else file.read("image", index) for index in range(10)]
    image = ModalityData(kind="image", values=images, layout="CHW")  # type: ignore[arg-type]
    write_file(folder / "bare.h5", task="shapes", modalities={"image": image})
    return folder / "bare.h5"


def test_a_file_without_labels_and_split(folder: Path, bare: Path, capsys: Capture) -> None:
    rows = predicted(folder, bare)
    printed = capsys.readouterr().out
    assert "no prediction for 1, which" in printed and "no score    the file has no labels" in printed
    assert [int(row["index"]) for row in rows] == [0, 1, 2, 4, 5, 6, 7, 8, 9] and list(rows[0])[-1] == "probability"
    model = moemm.load(folder / "run")
    with DataFile(bare, labelled=False) as file:
        given = [{"image": file.read("image", int(row["index"]))} for row in rows]
    answers = model.predict(given, task="shapes")  # type: ignore[arg-type]
    assert [one.answer for one in answers] == [row["predicted"] for row in rows]
    np.testing.assert_allclose(
        [one.scores.max() for one in answers], [float(r["probability"]) for r in rows], rtol=1e-5
    )

    arguments = ["predict", str(folder / "run"), "--data", str(bare), "--output"]
    assert main([*arguments, str(folder / "bare.jsonl")]) == 0
    lines = [json.loads(line) for line in (folder / "bare.jsonl").read_text().splitlines()]
    assert [{key: str(value) for key, value in line.items()} for line in lines] == rows
    capsys.readouterr()
    assert main([*arguments, str(folder / "bare_out.h5"), "--json", "--batch-size", "2"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 9 and summary["without_modality"] == 1 and summary["absent"] == ["record"]
    assert sum(one["samples"] for one in summary["classes"]) == 9 and summary["scores"] == {}
    with h5py.File(folder / "bare_out.h5") as file:
        names = [name.decode() for name in file["class_names"]]
        assert [names[number] for number in file["predicted"]] == [row["predicted"] for row in rows]
        assert file["probability"].shape == (9, 3) and "label" not in file and file.attrs["task"] == b"shapes"
        np.testing.assert_allclose(file["probability"][:].sum(1), 1.0, rtol=1e-5)


def test_a_bare_file_is_told_and_not_trained_on(folder: Path, bare: Path, tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(DataError, match="no labels"):
        DataFile(bare)
    data = {"root": str(folder), "tasks": [{"name": "bare", "file": "bare.h5"}]}
    with pytest.raises(DataError, match="no labels"):
        train(tiny_config(folder, data=data, train={"output": str(tmp_path / "run")}))
    assert main(["data", "inspect", str(bare)]) == 0
    assert "no split" in capsys.readouterr().out
    assert sum("can be predicted" in line for line in validate_file(bare).warnings) == 2
    assert repack_file(bare, tmp_path / "again.h5").labels == {}
    values = {"image": ModalityData(kind="image", values=np.zeros((4, 1, 8, 8), np.float32))}
    write_file(tmp_path / "labelled.h5", task="x", labels=np.arange(4), modalities=values)
    with pytest.raises(DataError, match="no dataset 'split'"):
        DataFile(tmp_path / "labelled.h5")
    with pytest.raises(DataError, match="4 rows"):
        write_file(tmp_path / "x.h5", task="x", labels=np.arange(3), modalities=values)
    more = {**values, "record": ModalityData(kind="tabular", values=Table(np.ones((5, 1)), np.zeros((5, 0))))}
    with pytest.raises(DataError, match="rows"):
        write_file(tmp_path / "x.h5", task="x", modalities=more)


def test_values_and_several_labels(folder: Path) -> None:
    rows = predicted(folder, "levels.h5", "--split", "val")
    assert list(rows[0]) == ["index", "predicted", "label"] and len(rows) == 16
    found = moemm.load(folder / "run").predict_file(folder / "levels.h5", split="val")
    assert [np.float32(row["predicted"]) for row in rows] == found.outputs[:, 0].tolist()
    error = np.mean([abs(float(row["predicted"]) - float(row["label"])) for row in rows])
    assert found.metrics() == {"mae": pytest.approx(error, rel=1e-6)}
    rows = predicted(folder, "levels.h5", "--task", "marks", "--split", "val")
    high, top = "probability_high", "probability_top|most"
    assert list(rows[0]) == ["index", "predicted", high, top, "label"]
    for row in rows:
        above = [name for name, column in (("high", high), ("top|most", top)) if float(row[column]) > 0.5]
        assert row["predicted"] == "|".join(above)
    assert main(["predict", str(folder / "run"), "--data", str(folder / "levels.h5"), "--output",
                 str(folder / "levels_out.h5")]) == 0  # fmt: skip
    with h5py.File(folder / "levels_out.h5") as file:
        assert file["predicted"].shape == file["label"].shape == (48,) and "probability" not in file


def made(output: Any, labels: Any = None, **task: Any) -> FilePredictions:
    """Predictions out of nothing."""
    output = np.asarray(output, np.float32)
    values = {"name": "t", "target": "regression", "outputs": output.shape[1], "class_names": (), "metric": "mae"}
    return FilePredictions(
        run=Path("r"), step=1, task=SimpleNamespace(**{**values, **task}), data="d.h5", split="all",  # type: ignore[arg-type]
        matched=Matched({"a": "a"}, (), ()), index=np.arange(len(output)), outputs=output, targets=labels,
        unlabelled="", skipped=0, seconds=0.5,
    )  # fmt: skip


def text_of(found: FilePredictions) -> str:
    from rich.console import Console

    console = Console(width=100, file=open("/dev/null", "w"), record=True)  # noqa: SIM115
    console.print(render_predictions(summarize(found)))
    return console.export_text()


def test_formats_of_what_is_rare() -> None:
    """Several columns, numbers that are not finite, many classes, names with markup and control characters."""
    found = made([[0.1, np.nan]], np.float32([[0.5, 1.0]]))
    assert to_csv(found) == "index,predicted_0,predicted_1,label_0,label_1\n0,0.1,nan,0.5,1.0\n"
    assert to_jsonl(found) == '{"index": 0, "predicted": [0.1, null], "label": [0.5, 1.0]}\n'
    assert found.metrics() == {}
    names = tuple(f"[red]{number}\x1b" for number in range(30))
    found = made(np.eye(30), np.arange(30), target="classification", metric="accuracy", class_names=names)
    assert found.metrics() == {"accuracy": 1.0}
    text = text_of(found)
    assert "[red]0\N{REPLACEMENT CHARACTER}" in text and "and 10 more" in text and "33.3%" in text
    assert "column" in text_of(made([[1.0, 2.0]]))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (LabelData(values=np.arange(10) % 3, class_names=("a", "c", "b")), "other class names"),
        (LabelData(values=np.arange(10)), "has 10 classes, the task 3"),
        (LabelData(values=np.ones(10, np.float32)), "is a regression, the task a classification"),
        (LabelData(values=np.arange(10) % 2), ""),
    ],
)
def test_labels_that_are_not_those_of_the_task_are_not_scored(
    folder: Path, bare: Path, tmp_path: Path, labels: LabelData, told: str, capsys: Capture
) -> None:
    with DataFile(bare, labelled=False) as file:
        images = [file.read("image", index) for index in range(10)]
    values = {"image": ModalityData(kind="image", values=images)}  # type: ignore[arg-type]
    write_file(tmp_path / "x.h5", task="shapes", labels={"label": labels}, modalities=values)
    rows = predicted(folder, tmp_path / "x.h5")
    assert ("label" in rows[0]) == (not told)
    assert (told or "accuracy  ") in capsys.readouterr().out


def image(values: Any, **given: Any) -> dict[str, ModalityData]:
    return {"image": ModalityData(kind="image", values=np.asarray(values, np.float32), **given)}


def series(**given: Any) -> ModalityData:
    values = np.ones((2, 5, given.pop("width", 4)), np.float32)
    return ModalityData(kind="timeseries", values=values, ragged=True, **given)


SOUND = np.zeros((2, 1, 8, 8))
EMPTY = Table(np.full((2, 2), np.nan), np.zeros((2, 0)))
REFUSED: dict[str, tuple[str, dict[str, ModalityData], list[str], int, str]] = {
    "task": ("shapse", image(SOUND), [], 2, "names the task 'shapse', which this model does not have; did you mean"),
    "--task": ("shapes", image(SOUND), ["--task", "tone"], 2, "allowed: shapes, tones, level, marks"),
    "none known": ("shapes", {"wave": series()}, [], 3, "none of the modalities of task shapes, only wave"),
    "unknown": ("shapes", {**image(SOUND), "recrod": series()}, [], 3, "did you mean record?"),
    "width": ("tones", {"series": series(width=3)}, [], 3, "shape (3,), and (4,) in training"),
    "rate": ("tones", {"wave": series(rate_hz=50)}, [], 3, "rate_hz 50.0, and 100.0 in training"),
    "no split": ("shapes", image(SOUND), ["--split", "test"], 3, "no split, so no samples of test"),
    "--missing": ("shapes", image(SOUND), ["--missing", "imgae"], 2, "no such modality; did you mean image?"),
    "all missing": ("tones", {"series": series()}, ["--missing", "wave"], 2, "nothing to predict from"),
    "nothing there": ("level", {"image": ModalityData(kind="text", values=["", ""])}, [], 3, "kind text, and image"),
    "empty": ("shapes", {"record": ModalityData(kind="tabular", values=EMPTY, num_names=("u", "v"))}, [], 3,
              "none of its 2 samples has a value of record"),
    "suffix": ("shapes", image(SOUND), ["--output", "x.npz"], 2, "allowed: names that end in .csv, .jsonl, .h5"),
    "exists": ("shapes", image(SOUND), ["--output", "given.h5"], 2, "is there already"),
    "no folder": ("shapes", image(SOUND), ["--output", "no/x.csv"], 2, "there is no folder no"),
    "folder": ("shapes", image(SOUND), ["--output", "is.csv"], 2, "is a folder"),
    "batch": ("shapes", image(SOUND), ["--batch-size", "0"], 2, "must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    folder: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    task, values, arguments, code, told = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    Path("is.csv").mkdir()
    write_file("given.h5", task=task, modalities=values)
    before = sorted(tmp_path.iterdir())
    assert main(["predict", str(folder / "run"), "--data", "given.h5", *arguments]) == code
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_are_not_there_or_cannot_be_written(
    folder: Path, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "nowhere", "--data", str(bare)]) == 4
    assert main(["predict", str(folder / "run"), "--data", "nowhere.h5"]) == 3
    assert main(["predict", str(folder / "run"), "--data", str(folder / "shapes.h5"), "--split", "ood"]) == 3
    assert "no sample of split ood\n  allowed: all, train, val, test" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    found = made([[1.0]])
    write_predictions(found, tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="is there already"):
        write_predictions(found, tmp_path / "a.csv")
    with pytest.raises(ConfigError, match=r"cannot be written: .*name too long"):
        write_predictions(found, tmp_path / f"{'x' * 250}.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
