"""Row 6, the part on launchers: a signal to the launcher of two ranks makes them save once, and all processes end."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from moemm.checkpoint import newest_complete
from moemm.distributed.environment import free_port
from moemm.errors import CheckpointError
from moemm.testing.tiny import tiny_config

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("torchrun", "deepspeed", "local")
LAUNCHED = list(itertools.product(LAUNCHERS, (signal.SIGTERM, signal.SIGINT)))
"""Launcher x signal. `local` is the script of `moemm launch local`."""
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_END_S = 60.0


def judge(folder: Path, launcher: str, number: signal.Signals) -> str:
    """What was wrong with a case; empty where it went as it must."""
    folder.mkdir(parents=True)
    config = tiny_config(
        folder,
        train={"output": str(folder / "run"), "steps": 100_000, "baselines": False},
        deepspeed={"zero_stage": 1, "timeout_s": 30},
    ).path
    environment = {key: value for key, value in os.environ.items() if key not in _VARIABLES}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with (folder / "log.txt").open("w+b") as log:
        process = subprocess.Popen(
            _command(launcher, config), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if not _wait_for(folder / "log.txt", b"step 3/", 120.0):
                return f"did not begin: {(folder / 'log.txt').read_text()[-500:]}"
            if launcher == "deepspeed":  # on one host it passes no signal on: it goes to all, as Ctrl-C does
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            code = process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return f"did not end in {_END_S:.0f} s"
        finally:
            left = _left(process.pid)
            if process.poll() is None or left:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if left:
        return f"{left} process(es) went on without the launcher"
    return _saved_once(folder / "run" / "checkpoints") or ("" if code else "the launcher's exit code is 0")


def _command(launcher: str, config: Path) -> list[str]:
    port, train = str(free_port()), ["train", str(config)]
    if launcher == "torchrun":
        return ["torchrun", "--nproc-per-node", "2", "--master-port", port, "-m", "moemm", *train]
    if launcher == "deepspeed":
        return ["deepspeed", "--num_accelerators", "2", "--master_port", port, "--module", "moemm", *train]
    return [sys.executable, "-m", "moemm", "launch", "local", str(config), "--ranks", "2", "--port", port]


def _wait_for(path: Path, text: bytes, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if text in path.read_bytes():
            return True
        time.sleep(0.2)
    return False


def _left(group: int) -> int:
    """Processes of a group that go on after its leader ended: DeepSpeed's does not wait for the ranks' last save."""
    end = time.monotonic() + _END_S / 2
    while (found := _alive(group)) and time.monotonic() < end:
        time.sleep(0.5)
    return found


def _alive(group: int) -> int:
    found = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += int(fields[2]) == group and fields[0] not in "ZX"
    return found


def _saved_once(root: Path) -> str:
    names = sorted(path.name for path in root.glob("*")) if root.exists() else []
    if len(names) != 2 or names[0] != "latest":
        return f"saved {names}"
    try:
        newest_complete(root)
    except CheckpointError as error:
        return str(error)
    return ""
