"""Jobs of several processes that start at once: ranks are forked from a process that has imported all already.

with Nursery() as nursery:
    results = nursery.run("jobs:job", ranks=2, arguments={"stage": 1}, path=[HERE])   # as testing.distributed has it
    results = nursery.moemm(["train", "tiny.yaml"], ranks=2, environ={"MOEMM_FAULT": "kill:save.rename"})

Importing torch and DeepSpeed takes a rank six seconds, a fork some milliseconds: what makes hundreds of faults in a
test possible. A rank that stopped, or goes on for `linger_s` after another one failed, is killed: a launcher would.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moemm.distributed.environment import free_port

_MODULES = ("moemm.train", "moemm.cli.train", "deepspeed", "tensorboard", "PIL.Image", "torch._inductor", "tyro")
"""Imported before the first fork; torch imports _inductor when it is made deterministic."""
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class RankResult:
    """What became of one rank: the function's value (None if it raised), all that it printed.

    returncode: negative for a signal. seconds: from the start of the job to the rank's end.
    """

    value: Any
    returncode: int
    output: str
    seconds: float


class Nursery:
    """The process that ranks are forked from; it ends with the block."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        root = str(Path(__file__).resolve().parents[2])
        environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moemm.testing.forked"],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and the ranks that it has started."""
        if self.alive:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def run(
        self,
        function: str,
        *,
        ranks: int = 2,
        arguments: Mapping[str, Any] | None = None,
        environ: Mapping[str, str] | None = None,
        path: Sequence[Path | str] = (),
        timeout_s: float = 120.0,
        linger_s: float = 60.0,
        check: bool = False,
    ) -> list[RankResult]:
        """Run `module:name` with `arguments` in `ranks` processes; what became of each rank, by rank.

        With `check` an AssertionError shows the output of all ranks if one of them ended with another code than 0.
        """
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "function": function, "ranks": ranks, "arguments": dict(arguments or {}), "folder": folder,
                "environ": dict(environ or {}), "path": [str(part) for part in path], "timeout_s": timeout_s,
                "linger_s": linger_s,
            }  # fmt: skip
            ends = self._ask(job)
            results = [collect(Path(folder), rank, *end) for rank, end in enumerate(ends)]
        if check and any(result.returncode for result in results):
            raise AssertionError(f"{function} failed:\n{shown(results)}")
        return results

    def _ask(self, job: dict[str, Any]) -> list[tuple[int, float]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            ends: list[tuple[int, float]] = json.loads(self._process.stdout.readline())
        except BaseException:  # a test's timeout, too: the answer that is still to come is not the next job's
            self.close()
            raise
        return ends

    @property
    def alive(self) -> bool:
        """Whether it can run another job."""
        return self._process.poll() is None

    def moemm(self, arguments: Sequence[str], **options: Any) -> list[RankResult]:
        """`moemm ARGUMENTS` in each rank; options as for `run`. The exit code is that of the command."""
        return self.run("moemm.testing.forked:_command", arguments={"argv": list(arguments)}, **options)


_shared: list[Nursery] = []


def shared_nursery() -> Nursery:
    """One for all of this process, made when it is first asked for."""
    if not _shared or not _shared[-1].alive:
        _shared.append(Nursery())
        atexit.register(_shared[-1].close)
    return _shared[-1]


def shown(results: Sequence[RankResult]) -> str:
    """The output of all ranks."""
    return "\n".join(
        f"--- rank {rank}, exit {one.returncode} after {one.seconds:.1f} s\n{one.output}"
        for rank, one in enumerate(results)
    )


def collect(folder: Path, rank: int, code: int, seconds: float) -> RankResult:
    """What a rank left in the job's folder: RANK.json, its value, and RANK.log, its output."""
    path = folder / f"{rank}.json"
    value = json.loads(path.read_text()) if path.exists() else None
    return RankResult(value, code, (folder / f"{rank}.log").read_text(errors="replace"), seconds)


def _command(argv: list[str]) -> None:
    from moemm.cli.app import main

    sys.argv = ["moemm", *argv]
    sys.exit(main(argv))


def _serve() -> None:
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what imports print is no answer
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no rank looks through what was imported, which takes .2 s each time and copies its pages
    for line in sys.stdin:
        os.write(answers, json.dumps(_job(json.loads(line))).encode() + b"\n")


def _job(job: dict[str, Any]) -> list[tuple[int, float]]:
    began, port = time.monotonic(), str(free_port())
    ranks = {_fork(job, rank, port): rank for rank in range(job["ranks"])}
    ends: dict[int, tuple[int, float]] = {}
    last = began + job["timeout_s"]
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        now = time.monotonic()
        if pid in ranks:
            code = os.waitstatus_to_exitcode(status)
            ends[ranks.pop(pid)] = code, now - began
            if code:
                last = min(last, now + job["linger_s"])
        elif now > last or (ends and all(_stopped(one) for one in ranks)):
            for one in ranks:
                os.kill(one, signal.SIGKILL)
            last = now + 3600.0
        else:
            time.sleep(_POLL_S)
    return [ends[rank] for rank in range(job["ranks"])]


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _fork(job: dict[str, Any], rank: int, port: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _become(job, rank, port)
        module, name = job["function"].split(":")
        value = getattr(importlib.import_module(module), name)(**job["arguments"])
        (Path(job["folder"]) / f"{rank}.json").write_text(json.dumps(value))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _become(job: dict[str, Any], rank: int, port: str) -> None:
    log = os.open(Path(job["folder"]) / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:0] = job["path"]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job["ranks"]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        **job["environ"],
    }


if __name__ == "__main__":
    _serve()
