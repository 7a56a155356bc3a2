from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import pytest
from data_files import every_form
from rich.console import Console

from moemm.data import DataFile, LabelData, ModalityData, Table, cost, inspect_file, repack_file, validate_file

GOOD = {"licence": "CC0", "pairing": "natural"}


def found(make_file: Any, **changes: Any) -> tuple[list[str], list[str]]:
    report = validate_file(make_file(**{**GOOD, **changes}))
    assert report.ok == (not report.errors)
    return report.errors, report.warnings


def test_a_good_file(make_file: Any) -> None:
    report = validate_file(make_file(**GOOD))
    assert report.ok
    lacking = "1 of 24 samples lack it"
    assert [warning for warning in report.warnings if lacking not in warning and "NaN" not in warning] == []
    assert report.lines[-1] == "24 samples (train 12, val 6, test 6, ood 0), 5 modalities, all values read"


WARNINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no licence": ({"licence": ""}, "@licence: empty"),
    "no pairing": ({"pairing": ""}, "@pairing: empty"),
    "no test split": ({"split": np.arange(24) % 2}, "no sample of split test"),
    "class nobody has": ({"class_names": ["x", "y", "z", "q"]}, "classes without any sample: q"),
    "group in two splits": (
        {"group": np.arange(24) % 8},
        "6 group(s) are in train and in val: 0, 1, 4, 5, 6 and 1 more",
    ),
    "the same sample twice": (
        {"modalities": {"x": ModalityData(kind="features", values=np.arange(24.0)[:, None] % 20)}},
        "4 sample(s) of test are also in train (train = test): 0 = 20, 1 = 21",
    ),
    "constant column": (
        {
            "modalities": {
                **every_form(),
                "x": ModalityData(kind="timeseries", values=np.ones((24, 3, 2)), channels="ab"),
            }
        },
        "x: constant or empty, so nothing to learn from: a, b",
    ),
    "nan": (
        {
            "modalities": {
                "x": ModalityData(
                    kind="tabular", values=Table(np.where(np.eye(24) > 0, 1.0, np.nan), np.zeros((24, 0)))
                )
            }
        },
        "are NaN or infinite",
    ),
    "missing share": ({}, "text: 1 of 24 samples lack it (4.2%)"),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_deserves_a_look(make_file: Any, case: str) -> None:
    changes, message = WARNINGS[case]
    errors, warnings = found(make_file, **changes)
    assert errors == []
    assert any(message in warning for warning in warnings), warnings


def test_every_error_is_reported(make_file: Any) -> None:
    labels = {
        "label": LabelData(values=np.where(np.arange(24) == 20, 2, 0), class_names=["x", "y", "z"]),
        "label_tags": LabelData(values=(np.arange(24)[:, None] >= [0, 15]).astype(np.uint8)),
    }
    path = make_file(labels=labels, split=np.repeat([0, 2], 12))
    with h5py.File(path, "r+") as file:
        file["modalities/record/cat"][5] = 4
        file["modalities/text/crc32"][7] += 1
    report = validate_file(path)
    expected = (
        "no sample of split val",
        "no training sample of z (1 in test)",
        "no training sample of class 1 (9 in test)",
        "sample 5: category 4",
        "sample 7: the text does not fit its checksum",
    )
    for message in expected:
        assert any(message in error for error in report.errors), report.errors
    assert report.lines[: len(report.errors)] == [f"error: {error}" for error in report.errors]


def test_a_sample_with_nothing_is_an_error(make_file: Any) -> None:
    texts = ModalityData(kind="text", values=["a", "", "", *"b" * 21])
    errors, _ = found(make_file, modalities={"text": texts})
    assert errors == ["2 sample(s) without any modality: index 1, 2"]


def test_data_without_checksums_is_pointed_out(make_file: Any) -> None:
    path = make_file(**GOOD)
    with h5py.File(path, "r+") as file:
        values = file["modalities/accel/data"][()]
        del file["modalities/accel/data"], file["modalities/text/crc32"]
        file["modalities/accel/data"] = values
        file["notes"] = 1
    warnings = validate_file(path).warnings
    assert any("/modalities/accel/data, texts of text" in warning for warning in warnings)
    assert any("never read: notes" in warning for warning in warnings)


@pytest.fixture
def large_file(make_file: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a file that is too large to be kept decoded; its images in chunks of the given shape."""
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 96, 96), np.uint8)
    modalities = {**every_form(), "photo": ModalityData(kind="image", values=images, layout="CHW")}

    def write(chunk: tuple[int, ...] | None) -> Any:
        path = make_file(**GOOD, modalities=modalities)
        if chunk:
            with h5py.File(path, "r+") as file:
                del file["modalities/photo/data"]
                file.create_dataset("modalities/photo/data", data=images, chunks=chunk, compression="gzip")
        monkeypatch.setattr(cost, "CACHE_BYTES", 1 << 19)
        return path

    return write


def test_chunks_that_make_samples_of_a_large_file_costly_are_pointed_out(
    large_file: Any, make_file: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def costly(path: Any) -> list[str]:
        return [warning for warning in validate_file(path).warnings if "to decode" in warning]

    path = large_file((24, 3, 96, 48))
    assert costly(path) == [], "648 KiB for 27 KiB: less than 16 of our own chunks"
    path = large_file((24, 3, 96, 96))
    with DataFile(path) as file:
        storage = file.layout.modalities["photo"].parts["data"]
    monkeypatch.setattr(cost, "_MOST", 9)
    (text,) = costly(path)
    assert text.startswith(
        "/modalities/photo/data: a sample of 27.0 KiB costs 648.0 KiB to decode, in 1 chunks of shape"
    )
    assert storage.chunk == (24, 3, 96, 96) and "chunks=(2, 3, 96, 96))" in text
    (text,) = costly(large_file((24, 1, 12, 12)))
    assert "costs 648.0 KiB to decode, in 192 chunks of shape (24, 1, 12, 12)" in text
    repack_file(path, tmp_path / "again.h5")
    assert costly(tmp_path / "again.h5") == [] == costly(large_file(None))
    monkeypatch.setattr(cost, "CACHE_BYTES", 1 << 20)
    assert costly(path) == [], "it is decoded once and kept"


def test_a_file_that_is_no_file(tmp_path: Any) -> None:
    report = validate_file(tmp_path / "nothing.h5")
    assert not report.ok and "No such file" in report.lines[0]


def test_inspect_shows_what_is_in_the_file(make_file: Any) -> None:
    labels = {
        "label": LabelData(values=np.arange(24) % 3, class_names=["\x1b[31mx", "[bold]y", "z"]),
        "label_size": LabelData(values=np.arange(24.0)),
        "label_tags": LabelData(values=np.ones((24, 40), np.uint8)),
    }
    path = make_file(labels=labels, group=np.arange(24) // 2, sources=["pypi:x==1"], honesty="made up", **GOOD)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(inspect_file(path))
    text = console.export_text()
    for expected in (
        "format moemm-1",
        "24: train 12, val 6, test 6, 12 groups",
        "CC0",
        "pypi:x==1",
        "natural",
        "made up",
        "25 Hz",
        "2 numbers, 1 categories",
        "T x 3",
        "1 / 3 / 5",
        "4.2%",
        "[bold]y",
        "33.3%",
        "regression, 1 columns",
        "and 10 more",
    ):
        assert expected in text
    assert "\x1b" not in text
