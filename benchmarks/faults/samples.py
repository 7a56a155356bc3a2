"""Row 11: corrupt samples, 30 kinds at 3 positions.

What must happen: the sample is put aside, quarantine.jsonl names file, key, index and reason, and the next sound one of
the split stands in for it, the same for one rank and for two.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.faults.outcome import Outcome, spread
from moemm.config import DataConfig, TaskConfig, TrainConfig
from moemm.config.schema import Config
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.data.loader import train_loader
from moemm.data.quarantine import Bad
from moemm.data.value import Table
from moemm.data.writer import ModalityData, write_file
from moemm.distributed import World
from moemm.train.quarantine import FILE_NAME, Quarantine

NUM, TRAIN, LENGTH = 40, 30, 6
POSITIONS = (0, TRAIN // 2, TRAIN - 1)
_Place = tuple[str, int, int]
"""A stored chunk: the data set, where its bytes stand in the file, how many there are."""


def write(path: Path) -> Path:
    """A file in which each sample has chunks of its own, so that broken bytes break one sample."""
    random = np.random.default_rng(0)
    write_file(
        path,
        task="probe",
        labels=np.arange(NUM) % 3,
        class_names=["a", "b", "c"],
        split=np.array([0] * TRAIN + [1] * 5 + [2] * 5),
        modalities={
            "image": ModalityData(kind="image", values=random.normal(size=(NUM, 1, 8, 8)).astype("f4"), layout="CHW"),
            "series": ModalityData(
                kind="timeseries",
                values=[random.normal(size=(LENGTH, 4)).astype("f4") for _ in range(NUM)],
                ragged=True,
            ),
            "note": ModalityData(kind="text", values=[f"sample {i}" for i in range(NUM)]),
            "record": ModalityData(
                kind="tabular",
                values=Table(random.normal(size=(NUM, 2)).astype("f4"), np.ones((NUM, 1), int)),
                cat_sizes=[3],
            ),
        },
    )
    with h5py.File(path, "r+") as file:
        for name, rows in (("image/data", 1), ("series/data", LENGTH), ("record/num", 1), ("record/cat", 1)):
            values = file[f"modalities/{name}"][:]
            del file[f"modalities/{name}"]
            chunk = (rows, *values.shape[1:])
            file.create_dataset(
                f"modalities/{name}", data=values, chunks=chunk, fletcher32=True, compression="gzip", shuffle=True
            )
    return path


def _stored(path: Path, name: str, index: int) -> _Place:
    with h5py.File(path) as file:
        data = file[f"modalities/{name}"]
        info = data.id.get_chunk_info_by_coord((index * data.chunks[0],) + (0,) * (data.ndim - 1))
        return name, info.byte_offset, info.size


def _bytes(change: Callable[[bytearray], None]) -> Callable[[Path, str, int], None]:
    def damage(path: Path, name: str, index: int) -> None:
        _, start, size = _stored(path, name, index)
        with path.open("r+b") as file:
            file.seek(start)
            held = bytearray(file.read(size))
            change(held)
            file.seek(start)
            file.write(held)

    return damage


def _flip(place: float, bit: int) -> Callable[[bytearray], None]:
    def change(held: bytearray) -> None:
        held[min(int(place * len(held)), len(held) - 1)] ^= 1 << bit

    return change


def _fill(first: float, last: float, value: int) -> Callable[[bytearray], None]:
    def change(held: bytearray) -> None:
        for position in range(int(first * len(held)), int(last * len(held))):
            held[position] = (held[position] + 1) % 256 if value < 0 else value

    return change


DAMAGE = {
    "one bit at the start": _flip(0.0, 3),
    "one bit in the middle": _flip(0.5, 0),
    "one bit of the checksum": _flip(1.0, 7),
    "zeros": _fill(0.0, 1.0, 0),
    "ones": _fill(0.0, 1.0, 255),
    "second half lost": _fill(0.5, 1.0, 0),
    "other bytes": _fill(0.0, 1.0, -1),
}
ARRAYS = ("image/data", "series/data", "record/num")


def _damage(name: str, kind: str, path: Path, index: int) -> None:
    _bytes(DAMAGE[kind])(path, name, index)


def _value(name: str, value: Any) -> Callable[[Path, int], None]:
    def change(path: Path, index: int) -> None:
        rows = slice(index * LENGTH, (index + 1) * LENGTH) if name.startswith("series") else index
        with h5py.File(path, "r+") as file:
            held = file[f"modalities/{name}"][rows]
            if callable(value):
                value(held)
            else:
                held = value
            file[f"modalities/{name}"][rows] = held

    return change


def _one(value: float) -> Callable[[np.ndarray], None]:
    def change(held: np.ndarray) -> None:
        held.flat[held.size // 2] = value

    return change


def _everywhere(value: float) -> Callable[[np.ndarray], None]:
    return lambda held: held.fill(value)


KINDS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    **{
        f"{name}: {kind}": (name.split("/")[0], functools.partial(_damage, name, kind))
        for name, kind in itertools.product(ARRAYS, DAMAGE)
    },
    "image: an infinite pixel": ("image", _value("image/data", _one(math.inf))),
    "image: minus infinity": ("image", _value("image/data", _one(-math.inf))),
    "image: only NaN": ("image", _value("image/data", _everywhere(math.nan))),
    "series: an infinite value": ("series", _value("series/data", _one(math.inf))),
    "series: NaN in every row": ("series", _value("series/data", _everywhere(math.nan))),
    "record: an infinite number": ("record", _value("record/num", _one(math.inf))),
    "record: a category too large": ("record", _value("record/cat", _everywhere(99))),
    "record: a negative category": ("record", _value("record/cat", _everywhere(-1))),
    "note: not UTF-8": ("note", _value("note/data", b"\xff\xfe\xfa")),
    "note: another text than its checksum says": ("note", _value("note/data", b"other text")),
    "note: a huge text": ("note", _value("note/data", b"x" * (3 << 20))),
    "note: a wrong checksum": ("note", _value("note/crc32", 12345)),
}  # fmt: skip
"""Name -> the modality that is broken, and what breaks it. Texts have no chunk of their own."""
CORRUPT = "corrupt samples"
CASES = list(itertools.product(KINDS, POSITIONS))


def _catalogue(path: Path) -> tuple[Catalogue, Config]:
    data = DataConfig(tasks=[TaskConfig(name="probe", file=path.name)], root=str(path.parent), num_workers=0)
    config = Config(data=data, train=TrainConfig(batch_size=6))
    return build_catalogue(config.data, base=path.parent), config


def _epoch(catalogue: Catalogue, config: Config, ranks: int) -> tuple[list[int], list[Bad]]:
    """The samples of an epoch in their global order, and what was put aside."""
    loaders = [train_loader(catalogue, config, rank=rank, world_size=ranks) for rank in range(ranks)]
    iterators = [iter(loader) for loader in loaders]
    drawn = [int(i) for _ in range(TRAIN // 6) for one in iterators for i in next(one).index]
    found = [bad for loader in loaders for bad in loader.bad]
    for loader in loaders:
        loader.close()
    return drawn, found


def judge(folder: Path, kind: str, position: int) -> str:
    """What was wrong with a case; empty where it went as it must."""
    modality, damage = KINDS[kind]
    path = write(folder / "probe.h5")
    before, none = _epoch(*_catalogue(path), 1)
    damage(path, position)
    catalogue, config = _catalogue(path)
    (one, bad), (two, _) = (_epoch(catalogue, config, ranks) for ranks in (1, 2))
    expected = [(position + 1) % TRAIN if i == position else i for i in before]
    if none or one != expected or two != expected:
        return f"drew {one} and {two}, not {expected}"
    log = folder / FILE_NAME
    log.unlink(missing_ok=True)
    Quarantine(folder, World(), samples=TRAIN).add(bad, step=1)
    (line,) = [json.loads(text) for text in log.read_text().splitlines()]
    known = {"file": str(path), "key": f"/modalities/{modality}", "index": position, "by": (position + 1) % TRAIN}
    return "" if known.items() <= line.items() and line["reason"] else f"quarantine.jsonl says {line}"


def run(folder: Path, count: int) -> Outcome:
    """`count` cases, spread over all."""
    wrong = []
    cases = spread(CASES, count)
    for kind, position in cases:
        text = judge(folder, kind, position)
        if text:
            wrong.append(f"{kind} at {position}: {text}")
    return Outcome(CORRUPT, len(cases), wrong)
