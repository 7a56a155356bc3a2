"""What benchmarks that train have in common: `moemm` in processes of their own, and rows of means over seeds."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from benchmarks.record import Row
from moemm.evaluate.metrics import LOWER_IS_BETTER

ROOT = Path(__file__).parents[1]
CORE = ROOT / "configs" / "base" / "core.yaml"
"""The ten core tasks of the suite, for `base:`; their files are in the folder that suite() gives."""
Summary = dict[str, Any]


def suite() -> Path:
    """The folder that MOEMM_SUITE names. Raises SystemExit where it names none."""
    folder = os.environ.get("MOEMM_SUITE")
    if not folder:
        raise SystemExit("set MOEMM_SUITE to the folder of the suite's files (digits_hard.h5, avclip.h5 ...)")
    return Path(folder).resolve()


@contextmanager
def two_at_a_time(folder: Path | None) -> Iterator[tuple[Path, ThreadPoolExecutor]]:
    """A folder for runs, a temporary one unless given, and a pool that makes two of them at a time, a core each."""
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(max_workers=2) as pool:
        kept = (folder or Path(temporary)).resolve()
        kept.mkdir(parents=True, exist_ok=True)
        yield kept, pool


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration; its path."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def moemm(*arguments: str, one_core: bool = True) -> str:
    """What `moemm` prints for these arguments. Raises SystemExit with the end of its output where it fails.

    It runs in the checkout's folder: paths are absolute, or relative to that.
    """
    command = [sys.executable, "-W", "ignore", "-m", "moemm", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if one_core else dict(os.environ)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        output = f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{output}")
    return done.stdout


def train(output: Path, *arguments: str, one_core: bool = True) -> Summary:
    """The summary of `moemm train ARGUMENTS`, which writes to output.

    A run that is finished is not run again; one that was cut off begins anew, for its time is part of its summary.
    """
    path = output / "summary.json"
    if not path.exists():
        shutil.rmtree(output, ignore_errors=True)
        moemm("train", *arguments, one_core=one_core)
    summary: Summary = json.loads(path.read_text(encoding="utf-8"))
    print(f"{output.name}: mean {mean_score(summary):.4f}, {summary['seconds']:.0f} s", flush=True)
    return summary


def overrides(section: str, values: dict[str, Any]) -> list[str]:
    """The values of a section as options of `moemm train`: --train.steps=300."""
    flat = {f"{section}.{key}": value for key, value in values.items() if not isinstance(value, dict)}
    inner = [overrides(f"{section}.{key}", value) for key, value in values.items() if isinstance(value, dict)]
    own = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat.items()]
    return [*own, *(option for options in inner for option in options)]


def mean_score(summary: Summary) -> float:
    """Mean of the test scores of all tasks. Raises SystemExit where a score is better when lower."""
    if found := {task["metric"] for task in summary["tasks"].values()} & LOWER_IS_BETTER:
        raise SystemExit(f"no mean of scores that rise and scores that fall: {', '.join(sorted(found))}")
    return statistics.mean(task["test"] for task in summary["tasks"].values())


def row(case: str, metric: str, values: list[float], *, unit: str = "", target: float | None = None) -> Row:
    """Mean and deviation of values, one a seed."""
    value = statistics.mean(values)
    return Row(case=case, metric=metric, value=value, deviation=deviation(values), unit=unit, target=target)


def deviation(values: list[float]) -> float | None:
    """Sample deviation; None for one value."""
    return statistics.stdev(values) if len(values) > 1 else None
