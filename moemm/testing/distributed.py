"""Run a function in a job of several real processes, as a launcher would start them.

def job(stage):                      # in an importable module, here jobs.py; arguments and result are JSON
    return torch.distributed.get_rank() + stage

results = run_distributed("jobs:job", ranks=2, arguments={"stage": 1})
[result.value for result in results] == [1, 2]
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemm.distributed.environment import free_port


@dataclass(frozen=True, slots=True)
class RankResult:
    """What became of one rank: the function's value (None if it raised), its exit code, all that it printed."""

    value: Any
    returncode: int
    output: str


def run_distributed(
    function: str,
    *,
    ranks: int = 2,
    arguments: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    path: Sequence[Path | str] = (),
    timeout_s: float = 120.0,
    check: bool = True,
) -> list[RankResult]:
    """Call `module:name` with `arguments` in `ranks` processes and collect the results by rank.

    path: folders to import `module` from. A job that outlives `timeout_s` is killed (return code -9).
    With `check` an AssertionError shows the output of the ranks if one of them ended with another code than 0.
    """
    command = [sys.executable, "-m", "moemm.testing.distributed", function, json.dumps(dict(arguments or {}))]
    with tempfile.TemporaryDirectory() as folder:
        results = _run(command, Path(folder), ranks, _environment(environ, path, ranks), timeout_s)
    if check and any(result.returncode for result in results):
        shown = "\n".join(f"--- rank {i}, exit {r.returncode}\n{r.output}" for i, r in enumerate(results))
        raise AssertionError(f"{function} failed:\n{shown}")
    return results


def _environment(environ: Mapping[str, str] | None, path: Sequence[Path | str], ranks: int) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    search = [str(root), *map(str, path), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "PYTHONPATH": os.pathsep.join(search),
        **(environ or {}),
    }


def _run(
    command: list[str], folder: Path, ranks: int, environment: dict[str, str], timeout_s: float
) -> list[RankResult]:
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [*command, str(folder / f"{rank}.json")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=logs[rank],
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [_collect(folder / f"{r}.json", logs[r], p.returncode) for r, p in enumerate(processes)]


def _collect(path: Path, log: Any, returncode: int) -> RankResult:
    log.seek(0)
    output = log.read()
    log.close()
    return RankResult(json.loads(path.read_text()) if path.exists() else None, returncode, output)


def _child() -> None:
    target, arguments, result = sys.argv[1:]
    module, name = target.split(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    _child()
