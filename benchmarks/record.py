"""What every benchmark writes: benchmarks/results/NAME.json, one row a measured figure."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "deepspeed", "transformers", "tutel", "numpy", "scikit-learn", "h5py")


@dataclass(kw_only=True)
class Row:
    """One figure. value and deviation are None where nothing was measured; target None where there is none.

    ok is computed: does value reach target, in the direction of `better`? note: why there is no value.
    """

    case: str
    metric: str
    value: float | None
    deviation: float | None = None
    unit: str = ""
    better: Literal["lower", "higher"] = "higher"
    target: float | None = None
    ok: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        self.ok = reaches(self.value, better=self.better, target=self.target)


def reaches(value: float | None, *, better: str, target: float | None) -> bool | None:
    """Whether a value meets its target; None where one of them is missing."""
    if value is None or target is None:
        return None
    return value >= target if better == "higher" else value <= target


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Rows shown as a table of their own: a line a case, a column a metric. columns: of each head, its metric.

    digits: decimals of figures under 20.
    """

    title: str
    columns: dict[str, str]
    digits: int = 2


class Kept(NamedTuple):
    """What stays of earlier runs where a result is measured anew in parts. of: the parts that are new."""

    of: list[str]
    rows: list[dict[str, Any]]
    matrices: list[dict[str, Any]]
    earlier: list[dict[str, Any]]


SOURCE = ("command", "commit", "machine", "versions", "seeds", "seconds")
"""How, where and with what rows were measured. In `earlier` with `of`: the parts of the result that are of that run."""


def keep(name: str, of: Collection[str], part: Callable[[dict[str, Any]], str]) -> Kept:
    """The rows of results/NAME.json that are not of the parts `of`, with the run that each part is from.

    part: a row -> its part. Nothing stays where there is no such file.
    """
    if not (RESULTS / f"{name}.json").exists():
        return Kept(list(of), [], [], [])
    result = read(name)
    rows = [row for row in result["rows"] if part(row) not in of]
    earlier = result.get("earlier", [])
    before = {one for run in earlier for one in run["of"]}
    last = [one for one in dict.fromkeys(map(part, rows)) if one not in before]
    runs = [*earlier, {"of": last, **{key: result[key] for key in SOURCE}}]
    left = [{**run, "of": [one for one in run["of"] if one not in of]} for run in runs]
    metrics = {row["metric"] for row in rows}
    matrices = [matrix for matrix in result.get("matrices", []) if metrics & set(matrix["columns"].values())]
    return Kept(list(of), rows, matrices, [run for run in left if run["of"]])


def as_dict(row: Row) -> dict[str, Any]:
    """A row as it is written: without the note where there is none."""
    return {key: value for key, value in asdict(row).items() if key != "note" or value}


def write(
    name: str,
    rows: Sequence[Row],
    *,
    seeds: Sequence[int] = (),
    seconds: float,
    matrices: Sequence[Matrix] = (),
    kept: Kept | None = None,
) -> Path:
    """Write results/NAME.json: the rows, and how, where and with what they were measured; before them those `kept`.

    Rows of no matrix are shown as a list. In the file a row takes one line.
    """
    before = kept or Kept([], [], [], [])
    record: dict[str, Any] = {
        "name": name,
        "command": " ".join(["python", *map(_relative, sys.orig_argv[1:])]),
        "commit": _commit(),
        "machine": machine(),
        "versions": versions(),
        "seeds": list(seeds),
        "seconds": round(seconds, 1),
    }
    if before.earlier:
        record |= {"of": before.of, "earlier": before.earlier}
    if tables := [*before.matrices, *map(asdict, matrices)]:
        record["matrices"] = tables
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = json.dumps(record, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in [*before.rows, *map(as_dict, rows)])
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    return path


def read(name: str) -> dict[str, Any]:
    """A result that was written. Raises FileNotFoundError with the command that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: make it with python -m benchmarks.{name}")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def machine() -> dict[str, Any]:
    """Processor, cores, GPU and memory (GiB) of this machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu(), "cores": os.cpu_count(), "gpu": gpu, "memory": round(memory, 1)}


def versions() -> dict[str, str]:
    """Versions of Python and the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str:
    """Of the code that runs here; results of other benchmarks that lie beside it, not committed yet, do not count."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return (_git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    except OSError:  # a machine that got the files without git
        return ""
    return result.stdout.strip()


def _relative(argument: str) -> str:
    """An argument without the place of this checkout; of a folder elsewhere only that there was one."""
    inside = argument.replace(f"{Path(__file__).parents[1]}/", "")
    return "FOLDER" if Path(inside).is_absolute() else inside
