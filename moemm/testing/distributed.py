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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moemm.distributed.environment import free_port
from moemm.testing.forked import RankResult, collect, shared_nursery, shown


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

    Ranks are forked from a process that has imported torch and DeepSpeed; with `environ` they are new processes.
    path: folders to import `module` from. A job that outlives `timeout_s` is killed (return code -9).
    With `check` an AssertionError shows the output of the ranks if one of them ended with another code than 0.
    """
    # What `environ` sets may matter to imports, and a device that was asked for does not survive a fork.
    if not environ and not torch.cuda.is_available():
        return shared_nursery().run(
            function, ranks=ranks, arguments=arguments, path=path, timeout_s=timeout_s, linger_s=timeout_s, check=check
        )
    command = [sys.executable, "-m", "moemm.testing.distributed", function, json.dumps(dict(arguments or {}))]
    with tempfile.TemporaryDirectory() as folder:
        results = _run(command, Path(folder), ranks, _environment(environ, path, ranks), timeout_s)
    if check and any(result.returncode for result in results):
        raise AssertionError(f"{function} failed:\n{shown(results)}")
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
    began, processes = time.monotonic(), []
    for rank in range(ranks):
        with (folder / f"{rank}.log").open("w") as log:
            own = [*command, str(folder / f"{rank}.json")]
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(own, env=variables, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [collect(folder, r, p.returncode, time.monotonic() - began) for r, p in enumerate(processes)]


def _child() -> None:
    target, arguments, result = sys.argv[1:]
    module, name = target.split(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result).write_text(json.dumps(value))


if __name__ == "__main__":
    _child()
