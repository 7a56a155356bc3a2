"""Corrupt samples: a few of the cases of benchmarks/faults/samples.py, and when they are too many."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from benchmarks.faults import samples
from moemm.data.quarantine import Bad, BadSampleError, first_sound
from moemm.data.sample import Sample
from moemm.data.shared import open_shared
from moemm.distributed import World
from moemm.errors import DataError
from moemm.testing.forked import Nursery
from moemm.testing.tiny import tiny_config
from moemm.train.quarantine import Quarantine


def test_corrupt_samples_are_put_aside_and_replaced(tmp_path: Path) -> None:
    assert len(samples.KINDS) >= 30
    assert samples.run(tmp_path, 8).wrong == []


def a_bad(index: int, file: str = "a.h5") -> Bad:
    return Bad(file, "/modalities/x", index, "it is broken", "a", index + 1)


def test_a_sample_is_listed_once_and_more_than_one_in_a_hundred_stop(tmp_path: Path) -> None:
    kept = Quarantine(tmp_path, World(), samples=300)
    assert "2 broken sample(s) put aside, 2 in all" in kept.add([a_bad(3), a_bad(5), a_bad(3)], step=4)
    assert kept.add([a_bad(5)], step=9) == ""
    again = Quarantine(tmp_path, World(), samples=300)
    assert len(again) == 2 and "sample 6 stands in for it" not in again.add([a_bad(7, "b.h5")], step=10)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["file"], line["index"], line["step"]) for line in lines] == [
        ("a.h5", 3, 4),
        ("a.h5", 5, 4),
        ("b.h5", 7, 10),
    ]
    with pytest.raises(DataError, match=r"4 of the 300 training samples are broken[\s\S]*allowed: 1%") as caught:
        again.add([a_bad(8)], step=11)
    assert "quarantine.jsonl" in str(caught.value)
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 4, "the last one is listed, too"


def test_one_broken_sample_of_a_few_does_not_stop(tmp_path: Path) -> None:
    assert Quarantine(tmp_path, World(), samples=10).add([a_bad(1)], step=1)


def test_a_hundred_in_a_row_are_an_error() -> None:
    def read(number: int) -> Sample:
        if number < 150:
            raise BadSampleError(
                f"f.h5: /modalities/x: sample {number}: no", file="f.h5", key="/modalities/x", index=number
            )
        return Sample("a", number, {}, 0)

    sample, bad = first_sound(read, 60, 200)
    assert sample.index == 150 and len(bad) == 90
    assert bad[0] == Bad("f.h5", "/modalities/x", 60, "no", "a", 150)
    with pytest.raises(DataError, match=r"f.h5: 100 samples in a row are broken, the first of them"):
        first_sound(read, 20, 200)
    error = pickle.loads(pickle.dumps(BadSampleError("text", file="f", key="k", index=3)))
    assert (str(error), error.file, error.key, error.index) == ("text", "f", "k", 3)


def test_a_broken_chunk_does_not_take_the_other_rows_of_a_small_array(tmp_path: Path) -> None:
    from moemm.data import DataFile

    path = samples.write(tmp_path / "probe.h5")
    samples.KINDS["image/data: zeros"][1](path, 4)
    with DataFile(path) as file:
        with pytest.raises(DataError, match="rows 4 to 4"):
            file.read("image", 4)
        assert np.isfinite(file.read("image", 5)).all()


def test_a_broken_sample_does_not_keep_its_file_open(tmp_path: Path) -> None:
    path = samples.write(tmp_path / "probe.h5")
    samples.KINDS["record/num: zeros"][1](path, 4)
    opened = []

    def read(number: int) -> Sample:
        file = open_shared(str(path))
        opened.append(weakref.ref(file))
        try:
            return Sample("probe", number, file.sample(number), 0)
        except DataError as error:
            raise BadSampleError(str(error), file=str(path), key="/modalities/record", index=number) from error

    gc.disable()
    try:
        sample, (bad,) = first_sound(read, 4, 30)
        assert (sample.index, bad.index) == (5, 4)
        assert [one() for one in opened] == [None, None], "an error's frames hold it until garbage is collected"
    finally:
        gc.enable()


def test_two_ranks_train_over_a_broken_sample_as_one_does(nursery: Nursery, tmp_path: Path) -> None:
    losses = {}
    for ranks in (1, 2):
        folder = tmp_path / f"ranks_{ranks}"
        folder.mkdir()
        train = {"output": str(folder / "run"), "steps": 12, "baselines": False}
        path = tiny_config(folder, train=train).path
        with h5py.File(folder / "shapes.h5", "r+") as file:
            file["modalities/image/data"][4] = np.inf  # of the train split
        nursery.moemm(["train", str(path)], ranks=ranks, check=True)
        (line,) = [json.loads(text) for text in (folder / "run" / "quarantine.jsonl").read_text().splitlines()]
        assert (line["key"], line["index"], line["by"]) == ("/modalities/image", 4, 5)
        assert line["file"].endswith("shapes.h5") and line["reason"] == "an infinite number"
        events = [json.loads(text) for text in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert any("put aside" in event.get("text", "") for event in events)
        losses[ranks] = [event["loss"] for event in events if event["event"] == "train"]
    torch.testing.assert_close(losses[1], losses[2], rtol=0, atol=1e-5)
