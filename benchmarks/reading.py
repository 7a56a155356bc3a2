"""Reading single samples, shuffled, of an array too large to be kept decoded: by the size of its chunks.

    MOEMM_SUITE=FOLDER python -m benchmarks.reading          # some minutes on one core

The videos of actions.h5 (12 kB each), repeated until they are more than a file may keep decoded, written as
moemm.data.write_file does, but for the size of chunks; and in the chunks that h5py chooses for itself. Each file is
opened anew in each round; files take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import h5py
import numpy as np

from benchmarks import record
from benchmarks.record import Matrix, Row
from benchmarks.runs import deviation, suite
from moemm.data import DataFile, ModalityData, layout, write_file, writer
from moemm.data.limits import CACHE_BYTES, KIB

SIZES = (256, 128, 64, 32, 16)
"""KiB of a chunk."""
READ, READ_FOREIGN = 1500, 30
OURS = {f"chunks of {kib} KiB": kib for kib in SIZES}
FOREIGN = "h5py's own chunks"
COLUMNS = {"a sample, ms": "a sample", "opening, ms": "opening", "file, MB": "file"}


def videos() -> np.ndarray:
    """(n, ...) float32, more bytes than DataFile keeps."""
    with DataFile(suite() / "actions.h5") as file:
        values = np.stack([file.sample(index)["video"] for index in range(len(file))])
    return np.concatenate([values] * (CACHE_BYTES // values.nbytes + 2))


def written(folder: Path, kib: int, values: np.ndarray) -> Path:
    """The file with chunks of that size."""
    path = folder / f"{kib}.h5"
    data = {"video": ModalityData(kind="video", values=values)}
    with mock.patch.object(writer, "_CHUNK_BYTES", kib * KIB):
        write_file(path, task="videos", labels=np.arange(len(values)) % 2, class_names=["a", "b"],
                   split=np.zeros(len(values), np.uint8), modalities=data)  # fmt: skip
    return path


def foreign(source: Path) -> Path:
    """The same file with its videos in chunks that h5py chose."""
    path = source.with_name("foreign.h5")
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "r+") as file:
        data = file["modalities/video/data"]
        values, filters = data[()], {key: getattr(data, key) for key in ("compression", "shuffle", "fletcher32")}
        del file["modalities/video/data"]
        file.create_dataset("modalities/video/data", data=values, chunks=True, **filters)
    return path


def read(path: Path, order: np.ndarray) -> tuple[float, float]:
    """Seconds to open a file for the first time, and for each of its samples in `order`."""
    layout._known.cache_clear()
    began = time.perf_counter()
    with DataFile(path) as file:
        opened = time.perf_counter()
        for index in order.tolist():
            file.read("video", index)
        return opened - began, (time.perf_counter() - opened) / len(order)


def main() -> None:
    """Measure, write results/reading.json, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    began, values, random = time.perf_counter(), videos(), np.random.default_rng(0)
    rows = [Row(case="decoded", metric="bytes", value=values.nbytes / 1e6, unit="MB")]
    with tempfile.TemporaryDirectory() as folder:
        files = {case: written(Path(folder), kib, values) for case, kib in OURS.items()}
        files[FOREIGN] = foreign(files["chunks of 64 KiB"])
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in files}
        for _ in range(rounds):
            order = random.permutation(len(values))[:READ]
            for case, path in files.items():
                times[case].append(read(path, order[:READ_FOREIGN] if case == FOREIGN else order))
        for case, path in files.items():
            opening, sample = zip(*times[case], strict=True)
            rows += [
                Row(case=case, metric="a sample", value=1000 * statistics.median(sample),
                    deviation=1000 * deviation(sample), unit="ms", better="lower"),
                Row(case=case, metric="opening", value=1000 * statistics.median(opening), unit="ms", better="lower"),
                Row(case=case, metric="file", value=path.stat().st_size / 1e6, unit="MB", better="lower"),
            ]  # fmt: skip
    matrix = Matrix(title="samples read one by one, shuffled", columns=COLUMNS, digits=2)
    path = record.write("reading", rows, seeds=[0], seconds=time.perf_counter() - began, matrices=[matrix])
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
