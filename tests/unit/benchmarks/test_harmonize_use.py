"""What the benchmark of harmonizers trains, plants, chooses and counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks import harmonize_use as use
from benchmarks import record, runs
from moemm.config import load_config
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.train import train

FILE, PROBES = use.AVCLIP.find(), list(use.AVCLIP.probes)


def scores(**cases: list[float]) -> use.Scores:
    """Of seeds 10 and 11, then 0, 1 ...: digit as given, motion 0.5; val as digit."""
    seeds = [*use.CHOICE, 0, 1]
    return {
        case.replace("_", " "): {
            seed: use.Score({"digit": value, "motion": 0.5}, value) for seed, value in zip(seeds, values, strict=True)
        }
        for case, values in cases.items()
    }


def test_val_of_other_seeds_chooses_and_neither_controls_nor_the_plain_sum_can_be_chosen() -> None:
    found = scores(plain_sum=[0.9] * 4, random=[0.9] * 4, mgda=[0.6, 0.7, 0.1, 0.1], upgrad=[0.6, 0.6, 0.8, 0.8])
    assert use.choose(found) == "mgda"


def test_the_chosen_method_is_held_to_the_plain_sum_of_the_same_seeds() -> None:
    found = scores(plain_sum=[0.9, 0.9, 0.2, 0.4], upgrad=[0.6, 0.6, 0.3, 0.3])
    rows = {(row.case, row.metric): row for row in use.rows_of(use.CLEAN, found, [0, 1])}
    mean, digit = (rows["avclip, upgrad (chosen) less plain sum", metric] for metric in ("mean of tasks", "digit"))
    assert mean.value == pytest.approx(0.0) and mean.target == 0.0
    assert digit.deviation == pytest.approx(0.02**0.5) and digit.target == pytest.approx(-(0.02**0.5)) and digit.ok
    assert rows["upgrad", "avclip: gain"].value == pytest.approx(0.0)
    assert rows["upgrad", "avclip: seeds with a gain"].value == 0.5
    assert ("plain sum", "avclip: gain") not in rows


def test_noise_is_planted_in_a_copy_only(tmp_path: Path) -> None:
    before = FILE.read_bytes()
    path = use.plant(FILE, tmp_path / "noisy.h5")
    assert FILE.read_bytes() == before
    with h5py.File(path) as file:
        noise, label = file["label_noise"][:], file["label"][:]
    assert set(noise) == set(range(use.NOISE_CLASSES))
    assert np.mean(noise == label) == pytest.approx(1 / use.NOISE_CLASSES, abs=0.02), "it says nothing about the digit"


def test_every_row_tells_its_setting() -> None:
    found = scores(plain_sum=[0.9] * 4, upgrad=[0.6] * 4)
    for name in (use.CLEAN, use.NOISE):
        assert {use.setting_of(record.as_dict(row)) for row in use.rows_of(name, found, [0, 1])} == {name}
    committed = record.read("harmonize_use")["rows"]
    assert {use.setting_of(row) for row in committed} >= {use.CLEAN, use.NOISE}


@pytest.mark.parametrize("name", use.SETTINGS)
def test_every_case_is_a_configuration_that_is_allowed(name: str, tmp_path: Path) -> None:
    noisy, subject = use.SETTINGS[name].noisy, use.SETTINGS[name].subject
    for case in use.SETTINGS[name].cases:
        tasks = list(subject.probes)[: 1 if case == use.ALONE else None]
        values = use.recipe(name, case, tasks=tasks, file=FILE.with_name(subject.file), seed=3, output=tmp_path)
        config = load_config(runs.write_config(tmp_path / "one.yaml", values)).config
        assert [task.name for task in config.data.tasks] == [*tasks, *([use.NOISE] if noisy else [])]
        assert config.train.lr == pytest.approx(subject.lr * use.RATES.get(case, 1.0)) and config.train.seed == 3


def test_a_file_that_is_not_there_is_told_before_any_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["harmonize_use", "--settings", "avclip", "stamps", "--folder", str(tmp_path)])
    monkeypatch.setattr(use, "score", lambda *arguments, **more: pytest.fail("it ran"))
    monkeypatch.setenv("MOEMM_SUITE", str(tmp_path))
    with pytest.raises(SystemExit, match=r"stamps\.h5 is not there: leave what reads it out of --settings"):
        use.main()


def test_stamps_are_scored_on_category_and_language_without_the_caption_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, draw = 40, np.random.default_rng(0)
    write_file(
        tmp_path / "stamps.h5",
        task="stamps",
        labels={name: LabelData(values=np.arange(count) % 3) for name in use.STAMPS.probes.values()},
        split=np.repeat([0, 1, 2], [20, 10, 10]),
        modalities={
            "image": ModalityData(kind="image", values=draw.random((count, 3, 32, 32), np.float32), layout="NCHW"),
            "speech": ModalityData(kind="audio_logmel", values=[draw.random((20, 40), np.float32)] * count),
            "text": ModalityData(kind="text", values=["a frog"] * count),
            "text_local": ModalityData(kind="text", values=["une grenouille"] * count),
        },
    )
    monkeypatch.setenv("MOEMM_SUITE", str(tmp_path))
    short = replace(use.SETTINGS["stamps"], subject=replace(use.STAMPS, epochs=1.0))
    monkeypatch.setitem(use.SETTINGS, "stamps", short)
    tasks = list(use.STAMPS.probes)
    for case in (use.ALONE, use.UPGRAD):
        assert list(use.score("stamps", case, seed=0, folder=tmp_path).of) == tasks
    path = use.place("stamps", use.UPGRAD, tasks=tasks, seed=0, folder=tmp_path).with_suffix(".yaml")
    assert all(task.modalities == ["image", "speech", "text"] for task in load_config(path).config.data.tasks)
    cases = {row.case for row in use.conflicts("stamps", [0], tmp_path)}
    assert cases == {"stamps, category | language, upgrad"}


def test_a_run_in_a_process_with_others_is_that_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(use.SETTINGS[use.NOISE], subject=replace(use.AVCLIP, epochs=0.1))
    monkeypatch.setitem(use.SETTINGS, use.NOISE, short)
    one = use.run(use.NOISE, use.UPGRAD, tasks=PROBES, seed=0, folder=tmp_path)
    use.run(use.NOISE, "mgda", tasks=PROBES, seed=1, folder=tmp_path)
    file = tmp_path / "noisy.h5"
    values = use.recipe(use.NOISE, use.UPGRAD, tasks=PROBES, file=file, seed=0, output=tmp_path / "again")
    train(load_config(runs.write_config(tmp_path / "again.yaml", values)))
    again = json.loads((tmp_path / "again" / "summary.json").read_text(encoding="utf-8"))
    assert again["tasks"] == one["tasks"]
    rows = list(use.conflicts(use.NOISE, [0], tmp_path))
    assert {row.case for row in rows} >= {"noise, digit | noise, upgrad", "noise, digit | motion, upgrad"}
