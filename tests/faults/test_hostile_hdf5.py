"""Files made to harm: each is refused with a message, before a byte of another file is read, within bounded memory."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from moemm.data import DataFile, ModalityData, Table, Value, layout, validate_file, write_file
from moemm.errors import DataError

N = 12
DATA = "modalities/x/data"


def write_good(path: Path) -> Path:
    random_values = np.random.default_rng(0).normal(size=(N, 4, 2)).astype(np.float32)
    write_file(
        path,
        task="good",
        labels=np.arange(N) % 2,
        class_names=["no", "yes"],
        split=np.array([0] * 6 + [1] * 3 + [2] * 3),
        modalities={
            "x": ModalityData(kind="timeseries", values=random_values),
            "r": ModalityData(kind="timeseries", values=[random_values[i, : 1 + i % 4] for i in range(N)]),
            "s": ModalityData(kind="text", values=[f"sample {i}" for i in range(N)]),
            "t": ModalityData(kind="tabular", values=Table(np.ones((N, 1)), np.ones((N, 1), int)), cat_sizes=[2]),
        },
    )
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_good(tmp_path_factory.mktemp("good") / "good.h5").read_bytes()


def make(path: Path, good: bytes, change: Callable[[h5py.File], object]) -> Path:
    path.write_bytes(good)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replace(file: h5py.File, name: str = DATA, **options: Any) -> h5py.Dataset:
    del file[name]
    return file.create_dataset(name, **options)


def read_all(path: Path) -> list[Any]:
    with DataFile(path) as file:
        values = [sorted(file.sample(i).items()) for i in range(len(file))]
        columns = [file.split.tobytes(), file.targets().tobytes(), str(file.modalities), str(file.info.labels)]
    return columns + [[(name, frozen(value)) for name, value in sample] for sample in values]


def frozen(value: Value) -> Any:
    if isinstance(value, Table):
        return value.num.tobytes(), value.cat.tobytes()
    return value if isinstance(value, str) else value.tobytes()


# --- other files -----------------------------------------------------------------------------------------------------


def virtual(file: h5py.File, victim: Path) -> None:
    del file[DATA]
    source = h5py.VirtualSource(victim, "data", shape=(N, 4, 2))
    plan = h5py.VirtualLayout(shape=(N, 4, 2), dtype="f4")
    plan[:] = source
    file.create_virtual_dataset(DATA, plan)


def virtual_unlimited(file: h5py.File, victim: Path) -> None:
    del file[DATA]
    source = h5py.VirtualSource(victim, "data", shape=(N, 4, 2), maxshape=(None, 4, 2))
    plan = h5py.VirtualLayout(shape=(N, 4, 2), dtype="f4", maxshape=(None, 4, 2))
    plan[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    file.create_virtual_dataset(DATA, plan)


def external_storage(file: h5py.File, victim: Path) -> None:
    replace(file, shape=(N, 4, 2), dtype="f4", external=[(victim, 0, N * 32)])


def external_link(file: h5py.File, victim: Path, *, name: str) -> None:
    if name in file:
        del file[name]
    file[name] = h5py.ExternalLink(victim, "/data")


OUTSIDE: dict[str, tuple[Callable[[h5py.File, Path], None], str]] = {
    "virtual dataset": (virtual, "virtual dataset"),
    "virtual dataset without end": (virtual_unlimited, "virtual dataset"),
    "external storage": (external_storage, "external storage"),
    "external link to data": (lambda f, v: external_link(f, v, name=DATA), "link to another file"),
    "external link to a modality": (lambda f, v: external_link(f, v, name="modalities/x"), "link to another file"),
    "external link to labels": (lambda f, v: external_link(f, v, name="label"), "link to another file"),
    "external link with an unknown name": (lambda f, v: external_link(f, v, name="more"), "link to another file"),
    "external link to everything": (lambda f, v: external_link(f, v, name="modalities"), "link to another file"),
}


class Watch:
    """Counts how often a file is opened or read, by inotify."""

    OPEN_OR_ACCESS = 0x20 | 0x01

    def __init__(self, path: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self.descriptor, os.fsencode(path), self.OPEN_OR_ACCESS) >= 0

    def touched(self) -> bool:
        try:
            return bool(os.read(self.descriptor, 4096))
        except BlockingIOError:
            return False
        finally:
            os.close(self.descriptor)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="watches files by inotify")
@pytest.mark.parametrize("kind", OUTSIDE)
def test_nothing_outside_the_file_is_read(kind: str, good: bytes, tmp_path: Path) -> None:
    victim = tmp_path / "victim.h5"
    with h5py.File(victim, "w") as file:
        file["data"] = np.zeros((N, 4, 2), np.float32)
    change, message = OUTSIDE[kind]
    path = make(tmp_path / "hostile.h5", good, lambda file: change(file, victim))
    watch = Watch(victim)
    with pytest.raises(DataError, match=message) as error:
        read_all(path)
    assert not watch.touched()
    assert str(path) in str(error.value) and "allowed:" in str(error.value) and "to do:" in str(error.value)


def test_the_watch_would_notice(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"x")
    watch = Watch(victim)
    victim.read_bytes()
    assert watch.touched()


# --- structure, types and attributes ---------------------------------------------------------------------------------


def attribute(name: str, value: Any, owner: str = "/") -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[owner].attrs[name] = value

    return change


def soft_link(file: h5py.File) -> None:
    del file["label"]
    file["label"] = h5py.SoftLink("/split")


def not_utf8(file: h5py.File) -> None:
    del file["modalities/s/crc32"]
    stored = replace(file, "modalities/s/data", shape=(N,), dtype=h5py.string_dtype())
    stored[:] = [b"\xff\xfe"] * N


def long_text(file: h5py.File) -> None:
    del file["modalities/s/crc32"]
    replace(file, "modalities/s/data", shape=(N,), dtype=h5py.string_dtype())[:] = ["x" * (1 << 21)] * N


def cycle(file: h5py.File) -> None:
    del file["modalities/x"]
    file["modalities/x"] = file["modalities"]


def offsets(values: list[int]) -> Callable[[h5py.File], object]:
    return lambda file: replace(
        file, "modalities/r/offsets", data=np.array(values + [values[-1]] * (N + 1 - len(values)))
    )


def gzip_twice(file: h5py.File) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((N, 4, 2))
    plist.set_deflate(9)
    plist.set_deflate(9)
    del file[DATA]
    h5py.h5d.create(file["modalities/x"].id, b"data", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((N, 4, 2)), plist)


def odd_float(file: h5py.File) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    del file[DATA]
    h5py.h5d.create(file["modalities/x"].id, b"data", kind, h5py.h5s.create_simple((N, 4, 2)))


def many_modalities(file: h5py.File) -> None:
    for i in range(300):
        file["modalities"].create_group(f"m{i}").attrs["kind"] = "features"


HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "soft link": (soft_link, "soft link"),
    "lzf, a filter that is a plugin elsewhere": (
        lambda f: replace(f, data=np.zeros((N, 4, 2), "f4"), compression="lzf"),
        "filters",
    ),
    "gzip of gzip": (gzip_twice, "each at most once"),
    "scale-offset": (lambda f: replace(f, data=np.zeros((N, 4), "i4"), scaleoffset=4), "filters"),
    "object references": (lambda f: replace(f, shape=(N,), dtype=h5py.ref_dtype), "class reference"),
    "region references": (lambda f: replace(f, shape=(N,), dtype=h5py.regionref_dtype), "class reference"),
    "compound": (lambda f: replace(f, shape=(N,), dtype=[("a", "f4"), ("b", "i8")]), "class compound"),
    "opaque": (lambda f: replace(f, shape=(N,), dtype="V8"), "class opaque"),
    "arrays of any length": (lambda f: replace(f, shape=(N,), dtype=h5py.vlen_dtype("f4")), "class variable-length"),
    "enumeration": (lambda f: replace(f, shape=(N,), dtype=h5py.enum_dtype({"A": 1})), "class enumeration"),
    "fixed text": (lambda f: replace(f, shape=(N,), dtype="S4"), "class fixed-length text"),
    "a float of its own": (odd_float, "elements of class"),
    "a scalar": (lambda f: replace(f, data=1.0), "scalar"),
    "a group for a dataset": (lambda f: (f.__delitem__(DATA), f.create_group(DATA)), "not a dataset"),
    "a type for a dataset": (lambda f: (f.__delitem__(DATA), f.__setitem__(DATA, np.dtype("f4"))), "not a dataset"),
    "a dataset for a modality": (lambda f: replace(f, "modalities/x", data=np.zeros(N)), "not a group"),
    "groups in a circle": (cycle, "kind"),
    "text for numbers": (lambda f: replace(f, data=["a"] * N), "numbers of kind"),
    "numbers for text": (lambda f: replace(f, "modalities/s/data", data=np.zeros(N)), "variable-length text"),
    "too few rows": (lambda f: replace(f, data=np.zeros((N - 1, 4, 2), "f4")), f"{N - 1} rows"),
    "float labels in two axes too many": (lambda f: replace(f, "label", data=np.zeros((N, 2, 2))), "shape"),
    "falling offsets": (offsets([0, 9, 3, 30]), "never falling"),
    "offsets beyond the data": (offsets([0, 1, 10**12]), "from 0 to"),
    "negative offsets": (offsets([-5, 1, 30]), "from 0 to"),
    "text that is not UTF-8": (not_utf8, "not UTF-8"),
    "text of 2 MiB": (long_text, "2.0 MiB"),
    "attribute that is an array": (attribute("kind", np.zeros(5000), "modalities/x"), "5000 values"),
    "attribute that is a reference": (lambda f: f.attrs.__setitem__("task", f["label"].ref), "class reference"),
    "a thousand attributes": (lambda f: [f.attrs.__setitem__(f"a{i}", i) for i in range(1000)], "attributes"),
    "JSON too deep": (attribute("class_names", "[" * 50_000), "JSON list"),
    "JSON that is no list": (attribute("sources", '{"a": 1}'), "JSON list"),
    "classes as text": (attribute("n_classes", "two"), "n_classes"),
    "a billion classes": (
        lambda f: (f.attrs.__delitem__("class_names"), attribute("n_classes", 10**9)(f)),
        "n_classes",
    ),
    "rate of nan": (attribute("rate_hz", float("nan"), "modalities/x"), "rate_hz"),
    "kind that is code": (attribute("kind", "os.system('x')", "modalities/x"), "name of a kind"),
    "terminal codes": (attribute("format", "\x1b[2J\x1b]0;x\x07"), "format"),
    "format of the future": (attribute("format", "moemm-9"), "moemm-1 or moemm-suite-1"),
    "three hundred modalities": (many_modalities, "1 to 256"),
    "two thousand names": (lambda f: [f.create_group(f"g{i}") for i in range(2000)], "names"),
    "ragged that is not": (attribute("ragged", True, "modalities/x"), "ragged is True"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_structure_is_refused(kind: str, good: bytes, tmp_path: Path) -> None:
    change, message = HOSTILE[kind]
    path = make(tmp_path / "hostile.h5", good, change)
    with pytest.raises(DataError, match=message) as error:
        read_all(path)
    text = str(error.value)
    assert str(path) in text and "allowed:" in text and "to do:" in text
    assert text.replace("\n", "").isprintable()
    assert not validate_file(path).ok


@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "device", "empty", "text", "nothing", "user block", "a name with \0"]
)
def test_what_is_no_hdf5_file(kind: str, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.h5"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/zero")
    elif kind == "user block":
        path.write_bytes(b"\0" * 512 + good)
    elif kind == "a name with \0":
        path = Path("a\0b")
    elif kind != "nothing":
        path.write_bytes(b"" if kind == "empty" else b"label,split\n1,0\n")
    with pytest.raises(DataError, match="an HDF5 file"):
        DataFile(path)


def test_all_problems_of_the_structure_come_at_once(good: bytes, tmp_path: Path) -> None:
    def change(file: h5py.File) -> None:
        replace(file, data=np.zeros((N - 1, 4, 2), "f4"))
        replace(file, "modalities/s/data", data=np.zeros(N))
        del file["modalities/t/cat"]

    with pytest.raises(DataError) as error:
        DataFile(make(tmp_path / "three.h5", good, change))
    assert all(f"/modalities/{name}" in str(error.value) for name in "xst")


# --- sizes that lie --------------------------------------------------------------------------------------------------


def bomb(file: h5py.File) -> None:
    """A chunk that declares 4 KiB and inflates to 256 MiB."""
    stored = replace(file, shape=(N, 4, 2), dtype="f4", chunks=(N, 4, 2), compression="gzip")
    stored.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(256 << 20), 9))


def small_bomb(file: h5py.File) -> None:
    """The same, small enough for its stored size to pass."""
    stored = replace(file, shape=(N, 4096), dtype="u1", chunks=(N, 4096), compression="gzip")
    stored.id.write_direct_chunk((0, 0), zlib.compress(bytes(48 << 20), 9))


LIES: dict[str, Callable[[h5py.File], object]] = {
    "2^40 elements, no chunk": lambda f: replace(f, shape=(N, 1 << 40), dtype="u1", chunks=(1, 1 << 20)),
    "2^40 elements, one piece": lambda f: replace(f, shape=(N, 1 << 40), dtype="u1"),
    "2^40 samples": lambda f: replace(f, "split", shape=(1 << 40,), dtype="u1", chunks=(1 << 20,), compression="gzip"),
    "a row of 65 MiB": lambda f: replace(
        f, data=np.zeros((2, 65 << 20), "u1"), chunks=(1, 1 << 20), compression="gzip"
    ),
    "a chunk of 64 MiB": lambda f: replace(f, data=np.zeros((1 << 26), "u1"), chunks=(1 << 26,), compression="gzip"),
    "chunks never written": lambda f: replace(f, shape=(N, 64), dtype="f4", chunks=(1, 64), compression="gzip"),
    "a piece never written": lambda f: replace(f, shape=(N, 64), dtype="f4"),
    "a chunk that holds 256 MiB": bomb,
    "a chunk that holds 48 MiB": small_bomb,
}


@pytest.fixture(scope="module")
def liars(good: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("liars")
    for number, change in enumerate(LIES.values()):
        make(folder / f"{number}.h5", good, change)
    return folder


def test_sizes_that_lie_are_refused_within_little_memory(liars: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        from moemm.data import DataFile, validate_file
        from moemm.errors import DataError

        def used():
            kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
            return max(resource.getrusage(kind).ru_maxrss for kind in kinds) >> 10

        before = used()
        for path in sorted(Path(sys.argv[1]).iterdir()):
            try:
                with DataFile(path) as file:
                    file.read("x", 0)
                print(path.name, "was read")
            except DataError as error:
                print(path.name, "refused")
        print("grew", used() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(liars)]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = answer.stdout.splitlines()
    assert [line for line in lines if "was read" in line] == []
    assert len(lines) == len(LIES) + 1
    assert int(lines[-1].split()[1]) < 48  # MiB, of which most is h5py itself


def test_zeros_are_no_lie_but_stay_out_of_memory(good: bytes, tmp_path: Path) -> None:
    zeros = np.zeros((N, 1 << 22), np.uint8)
    path = make(tmp_path / "zeros.h5", good, lambda f: replace(f, data=zeros, chunks=(1, 1 << 20), compression="gzip"))
    with DataFile(path) as file:
        for i in range(N):
            assert not np.asarray(file.read("x", i)).any()


# --- HDF5 itself going wrong -----------------------------------------------------------------------------------------


def test_an_endless_loop_in_hdf5_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "loop.h5"
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "moemm-1"  # variable-length text: kept in the heap
    data = bytearray(path.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + 16 : heap + 32] = bytes(16)  # an object of number 0 and size 0: HDF5 2.0 never gets past it
    path.write_bytes(data)
    monkeypatch.setattr(layout, "READ_SECONDS", 1.0)
    with pytest.raises(DataError, match=r"loop\.h5"):
        DataFile(path)


@pytest.mark.parametrize("ending", [signal.SIGSEGV, signal.SIGKILL, 0])
def test_a_crash_in_hdf5_is_an_error(good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: int) -> None:
    def crash(path: str, labelled: bool) -> Any:
        os.kill(os.getpid(), ending) if ending else os._exit(3)

    path = tmp_path / "crash.h5"
    path.write_bytes(good)
    monkeypatch.setattr(layout, "_read_file", crash)
    with pytest.raises(DataError, match=f"signal {int(ending)}" if ending else "exit code 3"):
        DataFile(path)


def test_memory_taken_by_hdf5_is_limited(good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.h5"
    path.write_bytes(good)
    monkeypatch.setattr(layout, "_read_file", lambda *_: bytearray(3 << 30))
    with pytest.raises(DataError, match="MemoryError"):
        DataFile(path)


# --- torn and rotten files -------------------------------------------------------------------------------------------


def test_every_truncation_is_noticed(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.h5"
    for end in [*range(0, len(good), len(good) // 40), len(good) - 1]:
        path.write_bytes(good[:end])
        with pytest.raises(DataError, match=r"torn\.h5"):
            read_all(path)


def test_no_flipped_bit_changes_a_value(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rotten.h5"
    path.write_bytes(good)
    expected = read_all(path)
    choose = random.Random(0)
    noticed = 0
    for _ in range(100):
        rotten = bytearray(good)
        rotten[choose.randrange(len(good))] ^= 1 << choose.randrange(8)
        path.write_bytes(rotten)
        try:
            assert read_all(path) == expected
        except DataError:
            noticed += 1
    assert noticed > 30  # the others hit bytes that nothing uses


def test_flipped_bits_in_stored_data_are_always_noticed(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rotten.h5"
    path.write_bytes(good)
    with DataFile(path) as file:
        places = [
            (int(offset), int(size))
            for storage in file.layout.storages()
            for offset, size in zip(storage.offsets, storage.sizes, strict=True)
        ]
    choose = random.Random(1)
    texts = good.index(b"sample 0")
    for offset, size in [*places, (texts, 8)]:
        rotten = bytearray(good)
        rotten[offset + choose.randrange(size)] ^= 1 << choose.randrange(8)
        path.write_bytes(rotten)
        with pytest.raises(DataError):
            read_all(path)
        assert not validate_file(path).ok
