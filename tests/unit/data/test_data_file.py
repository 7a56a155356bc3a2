from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from data_files import every_form
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moemm.data import DataFile, LabelData, ModalityData, Table, Value, layout, repack_file, write_file
from moemm.data.chunks import fletcher32
from moemm.data.hdf5 import chunk_rows
from moemm.errors import DataError

QUICKSTART = Path(__file__).parents[3] / "data" / "quickstart"
NAMES = ("digits_hard", "avclip", "watch", "vowels", "adult", "reviews")


def plain(value: Value | None) -> Any:
    """A value in a form that == compares, NaN equal to itself."""
    if isinstance(value, Table):
        return plain(value.num), plain(value.cat)
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def test_every_form_comes_back(make_file: Any) -> None:
    from data_files import every_form

    with DataFile(make_file()) as file:
        written = every_form()
        for i in range(len(file)):
            sample = file.sample(i)
            lacking = {1: {"record"}, 2: {"series"}, 3: {"text"}, 4: {"image"}}.get(i, set())
            assert set(sample) == set(written) - lacking
            assert np.array_equal(sample["accel"], np.float32(written["accel"].values[i]))
            for name in set(sample) & {"image", "series", "text"}:
                assert plain(sample[name]) == plain(written[name].values[i])
        for name in written:
            assert file.present(name).sum() == len(file) - (name != "accel")
        assert file.lengths("series").tolist() == [0 if i == 2 else 1 + i % 5 for i in range(len(file))]
        assert [m.dtype for m in file.modalities] == ["float32", "uint8", "float32", "float32", "text"]
        assert [m.shape for m in file.modalities] == [(6, 2), (1, 4, 4), (), (3,), ()]


def test_a_layout_is_read_anew_only_where_the_file_changed(make_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read, later = make_file(), layout.run_apart, time.time() + 10.0
    reads = []
    monkeypatch.setattr(layout, "run_apart", lambda *given, **named: reads.append(1) or read(*given, **named))
    for _ in range(2):
        DataFile(path).close()
    assert len(reads) == 2, "a file that was just written may change again without a sign of it"
    monkeypatch.setattr(layout.time, "time", lambda: later)
    for _ in range(3):
        DataFile(path).close()
    assert len(reads) == 3
    before, held = path.stat(), path.read_bytes()
    path.write_bytes(held[:-8] + bytes(8))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    DataFile(path).close()
    path.write_bytes(held[:8] + bytes(len(held) - 8))
    for _ in range(2):
        with pytest.raises(DataError):
            DataFile(path)
    assert len(reads) == 6, "a refusal is not kept"


def test_values_of_arrays_that_are_kept_are_those_of_arrays_that_are_not(make_file: Any) -> None:
    forms = every_form()
    lacking = [None, *forms["image"].values[1:]]
    path = make_file(modalities={**forms, "sometimes": ModalityData(kind="image", values=lacking, layout="CHW")})
    with DataFile(path) as kept, DataFile(path, cache_bytes=0) as not_kept:
        for _ in range(2):
            for index in range(len(kept)):
                mine, other = kept.sample(index), not_kept.sample(index)
                assert list(mine) == list(other) and ("sometimes" in mine) == (lacking[index] is not None)
                for name, value in mine.items():
                    parts = (
                        [(a, b) for a, b in zip(value, other[name], strict=True)] if isinstance(value, Table) else []
                    )
                    for a, b in parts or [(value, other[name])]:
                        assert type(a) is type(b) and np.array_equal(a, b, equal_nan=not isinstance(a, str))
                        assert isinstance(a, str) or (a.dtype == b.dtype and a.flags.writeable)
        assert {name for name, quick in kept._quick.items() if quick} == {*kept._layout.modalities} - {"text"}
        assert not any(not_kept._quick.values())
        for wrong in (-1, len(kept)):
            with pytest.raises(DataError, match=f"no sample {wrong}"):
                kept.read("image", wrong)
    with pytest.raises(DataError, match="is closed"):
        kept.read("image", 0)


def test_values_are_copies(make_file: Any) -> None:
    with DataFile(make_file()) as file:
        before = file.read("image", 0)
        assert isinstance(before, np.ndarray)
        before[:] = 7
        assert plain(file.read("image", 0)) != plain(before)


@pytest.mark.parametrize("cache_bytes", [0, 1000])
def test_reading_row_by_row_gives_the_same(make_file: Any, cache_bytes: int) -> None:
    path = make_file()
    with DataFile(path) as whole, DataFile(path, cache_bytes=cache_bytes) as rows:
        for i in reversed(range(len(whole))):
            for info in whole.modalities:
                assert plain(whole.read(info.name, i)) == plain(rows.read(info.name, i))


FILTERS = st.fixed_dictionaries(
    {"compression": st.sampled_from([None, "gzip"]), "shuffle": st.booleans(), "fletcher32": st.booleans()}
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    filters=FILTERS,
    dtype=st.sampled_from(["u1", "<i2", ">i4", "<f2", "<f4", ">f8", "<i8"]),
    layout=st.sampled_from(["chunked", "contiguous", "compact"]),
)
def test_reads_what_h5py_reads(
    tmp_path: Path, shape: list[int], data: st.DataObject, filters: dict[str, Any], dtype: str, layout: str
) -> None:
    shape[0] += 2
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    path = tmp_path / "layouts.h5"
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "moemm-1"
        file["label"], file["split"] = np.zeros(shape[0], np.int64), np.zeros(shape[0], np.uint8)
        group = file.create_group("modalities/x")
        group.attrs["kind"] = "features"
        if layout == "chunked":
            chunks = tuple(data.draw(st.integers(1, n), label="chunk") for n in shape)
            group.create_dataset("data", data=values, chunks=chunks, **filters)
        elif layout == "contiguous":
            group["data"] = values
        else:
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.COMPACT)
            space, kind = h5py.h5s.create_simple(tuple(shape)), h5py.h5t.py_create(np.dtype(dtype))
            created = h5py.h5d.create(group.id, b"data", kind, space, plist)
            created.write(h5py.h5s.ALL, h5py.h5s.ALL, values)
    with DataFile(path, cache_bytes=data.draw(st.sampled_from([0, 1 << 20]), label="cache_bytes")) as file:
        for i in range(shape[0]):
            value = file.read("x", i)
            assert isinstance(value, np.ndarray) and value.dtype.isnative
            assert value.dtype == (np.float32 if "f" in dtype else np.dtype(dtype).newbyteorder("="))
            assert np.array_equal(value, values[i])


@pytest.mark.parametrize("data", [b"", b"a", b"ab", b"\xff" * 4, bytes(range(256)) * 33, b"\xff\xfe" * 9001 + b"x"])
def test_fletcher32_is_hdf5s(tmp_path: Path, data: bytes) -> None:
    if not data:
        assert fletcher32(data) == 0
        return
    with h5py.File(tmp_path / "sum.h5", "w") as file:
        values = np.frombuffer(data, np.uint8)
        stored = file.create_dataset("x", data=values, chunks=values.shape, fletcher32=True)
        raw = stored.id.read_direct_chunk((0,))[1]
    assert int.from_bytes(raw[-4:], "little") == fletcher32(data)


def test_all_kinds_of_targets(make_file: Any) -> None:
    n = 24
    labels = {
        "label": LabelData(values=np.arange(n) % 3, class_names=["x", "y", "z"], metric="macro_f1"),
        "label_tags": LabelData(values=(np.arange(n)[:, None] % [2, 3] == 0).astype(np.uint8)),
        "label_size": LabelData(values=np.linspace(0, 1, n)),
        "label_place": LabelData(values=np.ones((n, 3), np.float32)),
    }
    with DataFile(make_file(labels=labels)) as file:
        found = {name: (info.target, info.outputs, info.metric) for name, info in file.info.labels.items()}
        assert found == {
            "label": ("classification", 3, "macro_f1"),
            "label_tags": ("multilabel", 2, "map"),
            "label_size": ("regression", 1, "mae"),
            "label_place": ("regression", 3, "mae"),
        }
        assert [file.targets(name).dtype.name for name in labels] == ["int64", "float32", "float32", "float32"]


def test_a_child_reads_what_its_parent_opened(make_file: Any) -> None:
    with DataFile(make_file(), cache_bytes=0) as file:
        file.read("accel", 0)
        child = os.fork()
        if child == 0:
            os._exit(0 if all(len(file.sample(i)) >= 4 for i in range(24)) else 1)
        assert len(file.sample(5)) == 5
        assert os.waitpid(child, 0)[1] == 0


def test_nan_in_a_signal_is_data(make_file: Any) -> None:
    values = np.ones((24, 6, 2), np.float32)
    values[0, 3], values[1] = np.nan, np.inf
    with DataFile(make_file(modalities={"x": ModalityData(kind="timeseries", values=values)})) as file:
        for i in range(2):
            assert np.array_equal(np.asarray(file.read("x", i)), values[i], equal_nan=True)


def test_bad_names_and_numbers_are_named(make_file: Any) -> None:
    with DataFile(make_file()) as file:
        with pytest.raises(DataError, match=r"no modality 'acel'.*\n.*accel, image"):
            file.read("acel", 0)
        with pytest.raises(DataError, match="no sample 24"):
            file.read("accel", 24)
        with pytest.raises(DataError, match=r"no label 'label_x'"):
            file.targets("label_x")
    with pytest.raises(DataError, match="is closed"):
        file.read("accel", 0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "split 4": ({"split": np.full(24, 4)}, "value 4 at sample 0"),
    "short split": ({"split": np.zeros(23, np.uint8)}, "24 rows"),
    "label above n_classes": ({"labels": np.arange(24)}, "labels up to 23 with n_classes 3"),
    "negative label": ({"labels": np.arange(24) - 1, "class_names": []}, "target -1 of sample 0"),
    "nan target": ({"labels": np.full(24, np.nan), "class_names": []}, "target nan of sample 0"),
    "multilabel 2": ({"labels": np.full((24, 2), 2), "class_names": []}, "target .2 2. of sample 0"),
    "no labels": ({"labels": {}}, "no labels"),
    "no modality": ({"modalities": {}}, "0 modalities"),
    "bad name": ({"modalities": {"a b": ModalityData(kind="image", values=np.zeros((24, 1)))}}, "named 'a b'"),
    "complex": ({"modalities": {"x": ModalityData(kind="x", values=np.zeros((24, 2), complex))}}, "compound"),
    "category too large": (
        {"modalities": {"x": ModalityData(kind="tabular", values=Table(np.ones((24, 1)), np.full((24, 1), 3)))}},
        "0 cat_sizes",
    ),
    "category out of range": (
        {
            "modalities": {
                "x": ModalityData(kind="tabular", values=Table(np.ones((24, 1)), np.full((24, 1), 3)), cat_sizes=[3])
            }
        },
        "category 3 of cat0",
    ),
    "never there": ({"modalities": {"x": ModalityData(kind="image", values=[None] * 24)}}, "every sample lacks it"),
    "two shapes": (
        {"modalities": {"x": ModalityData(kind="x", values=[np.zeros((2, 1 + i % 2)) for i in range(24)])}},
        "differ in shape",
    ),
    "two widths": (
        {"modalities": {"x": ModalityData(kind="x", values=[np.zeros((i + 1, 1 + i % 2)) for i in range(24)])}},
        "more than their first axis",
    ),
    "text over 1 MiB": ({"modalities": {"x": ModalityData(kind="text", values=["a" * 1_100_000] * 24)}}, "1.0 MiB"),
    "surrogate": ({"modalities": {"x": ModalityData(kind="text", values=["\ud800"] * 24)}}, "UTF-8"),
    "list attribute": (
        {"modalities": {"x": ModalityData(kind="x", values=np.zeros((24, 1)), attributes={"k": [1, 2]})}},
        "2 values",
    ),
    "huge attribute": ({"honesty": "x" * 70_000}, "more than 61440 bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_writer_refuses_what_the_reader_would(make_file: Any, tmp_path: Path, case: str) -> None:
    make_file("kept.h5")
    before = (tmp_path / "kept.h5").read_bytes()
    changes, message = WRONG[case]
    with pytest.raises(DataError, match=message) as error:
        make_file("kept.h5", **changes)
    assert "partial" not in str(error.value)
    assert (tmp_path / "kept.h5").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["kept.h5"]


def test_a_category_out_of_range_is_named_when_read(make_file: Any) -> None:
    path = make_file()
    with h5py.File(path, "r+") as file:
        file["modalities/record/cat"][5] = 4
    with DataFile(path) as file, pytest.raises(DataError, match=r"sample 5: category 4 of cat0\n.*0 \(missing\) to 3"):
        file.read("record", 5)


def test_writing_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be written"):
        write_file(
            tmp_path / "no" / "x.h5",
            task="t",
            labels=np.zeros(2, int),
            split=np.array([0, 1]),
            modalities={"x": ModalityData(kind="features", values=np.zeros((2, 3)))},
        )


def test_everything_written_has_a_checksum(make_file: Any) -> None:
    with DataFile(make_file()) as file:
        for storage in file.layout.storages():
            assert storage.checked and storage.chunk[1:] == storage.shape[1:]
            assert "fletcher32" in storage.filters or storage.name.endswith("text/data")
        assert file.layout.attributes["format"] == "moemm-1"


def test_chunks_hold_a_few_whole_rows_and_grow_with_the_array() -> None:
    kib, gib = 1 << 10, 1 << 30
    assert chunk_rows(5, 12 * kib, 64 * kib) == chunk_rows(5000, 12 * kib, 64 * kib) == 5
    assert chunk_rows(3, 1, 64 * kib) == 3, "no more than there are"
    assert chunk_rows(10, 100 * kib, 64 * kib) == 1, "a row is never cut"
    assert [chunk_rows(n * gib // kib, kib, 64 * kib) for n in (4, 8, 16, 400)] == [64, 128, 256, 256]


def test_repacking_changes_no_value(make_file: Any, tmp_path: Path) -> None:
    source = make_file(group=np.arange(24) // 2, sources=["pypi:x==1"], licence="CC0", honesty="made up")
    repack_file(source, tmp_path / "again.h5")
    with DataFile(source) as old, DataFile(tmp_path / "again.h5") as new:
        assert_same(old, new)


def assert_same(old: DataFile, new: DataFile) -> None:
    assert old.modalities == new.modalities
    for key in ("task", "licence", "pairing", "honesty", "sources", "num_samples", "labels"):
        assert getattr(old.info, key) == getattr(new.info, key)
    assert np.array_equal(old.split, new.split)
    assert np.array_equal(np.asarray(old.group), np.asarray(new.group))
    for label in old.info.labels:
        assert plain(old.targets(label)) == plain(new.targets(label))
    for i in range(len(old)):
        assert {k: plain(v) for k, v in old.sample(i).items()} == {k: plain(v) for k, v in new.sample(i).items()}


@pytest.mark.parametrize("name", NAMES)
def test_quickstart_files_are_as_listed(name: str) -> None:
    path = QUICKSTART / f"{name}.h5"
    listed = (QUICKSTART / "LICENCES.md").read_text(encoding="utf-8")
    section = re.search(rf"## {name}\.h5\n(.*?)(?=\n## |\Z)", listed, re.DOTALL)
    assert section is not None
    assert hashlib.sha256(path.read_bytes()).hexdigest() in section[1]
    with DataFile(path) as file:
        for text in (file.info.licence, file.info.pairing, file.info.honesty, *file.info.sources):
            assert text and text in section[1]


@pytest.mark.parametrize("name", NAMES)
def test_quickstart_values_are_the_suites(name: str) -> None:
    suite = os.environ.get("MOEMM_SUITE")
    if not suite:
        pytest.skip("set MOEMM_SUITE to the folder of the suite's files")
    with DataFile(Path(suite) / f"{name}.h5") as old, DataFile(QUICKSTART / f"{name}.h5") as new:
        assert_same(old, new)


def test_every_file_of_the_suite_reads() -> None:
    suite = os.environ.get("MOEMM_SUITE")
    if not suite:
        pytest.skip("set MOEMM_SUITE to the folder of the suite's files")
    for path in sorted(Path(suite).glob("*.h5")):
        with DataFile(path) as file, h5py.File(path) as reference:
            for i in (0, len(file) // 2, len(file) - 1):
                for name, value in file.sample(i).items():
                    stored = reference[f"modalities/{name}"]
                    if "offsets" in stored:
                        start, stop = stored["offsets"][i : i + 2]
                        assert np.array_equal(
                            np.asarray(value), stored["data"][start:stop].astype(np.asarray(value).dtype)
                        )
                    elif isinstance(value, Table):
                        assert np.array_equal(value.num, stored["num"][i], equal_nan=True)
                        assert np.array_equal(value.cat, stored["cat"][i])
                    elif isinstance(value, str):
                        assert value.encode() == stored["data"][i]
                    else:
                        assert np.array_equal(value, stored["data"][i])
