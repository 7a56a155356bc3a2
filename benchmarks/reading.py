"""Reading single samples, shuffled, of an array too large to be kept decoded: by the size of its chunks.

    MOEMM_SUITE=FOLDER python -m benchmarks.reading          # some minutes on one core

The videos of actions.h5 (12 kB each), repeated until they are more than a file may keep decoded, written as
moemm.data.write_file does, but for the size of chunks. Each file is opened anew in each round; files take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from benchmarks import record
from benchmarks.record import Matrix, Row
from benchmarks.runs import deviation, suite
from moemm.data import DataFile, ModalityData, layout, write_file, writer
from moemm.data.limits import CACHE_BYTES, KIB

SIZES = (256, 128, 64, 32, 16)
"""KiB of a chunk."""
READ = 1500
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
        files = {kib: written(Path(folder), kib, values) for kib in SIZES}
        orders = [random.permutation(len(values))[:READ] for _ in range(rounds)]
        times: dict[int, list[tuple[float, float]]] = {kib: [] for kib in files}
        for order in orders:
            for kib, path in files.items():
                times[kib].append(read(path, order))
        for kib, path in files.items():
            opening, sample = zip(*times[kib], strict=True)
            case = f"chunks of {kib} KiB"
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
