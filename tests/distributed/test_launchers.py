"""The command line behind real launchers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moemm.distributed.environment import free_port
from moemm.testing.tiny import tiny_config

ROOT = Path(__file__).parents[2]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**changes: str) -> dict[str, str]:
    """This process's environment as a user's shell would have it."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": search, **changes}


def run(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    return tiny_config(folder, train={"steps": 4, "output": str(folder / "run")}, deepspeed={"zero_stage": 1}).path


def test_deepspeed_trains_and_torchrun_goes_on(config: Path) -> None:
    port = str(free_port())
    first = run(
        sys.executable, "-m", "moemm", "launch", "deepspeed", str(config), "--ranks", "2", "--port", port
    )  # fmt: skip
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 rank(s) on cpu, ZeRO 1" in first.stdout and "step 4/4" in first.stdout
    assert first.stdout.count("┃ scikit-learn") == 1, "one rank prints"
    assert "Warning" not in re.sub(r".*(real_accelerator|runner)\.py.*", "", first.stdout + first.stderr)
    summary = json.loads((config.parent / "run" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 4
    port = str(free_port())
    second = run(
        sys.executable, "-m", "moemm", "launch", "torchrun", str(config), "--ranks", "2", "--port", port, "--resume",
        "--train.steps", "6",
    )  # fmt: skip
    assert second.returncode == 0, second.stdout + second.stderr
    assert "(step 4)" in second.stdout and "step 6/6" in second.stdout and "step 4/6" not in second.stdout


def test_port_in_use(config: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        found = run(
            sys.executable, "-m", "moemm", "train", str(config), "--train.output", str(config.parent / "other"),
            RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        )  # fmt: skip
    assert found.returncode == 6
    assert f"[rank 0] error: Port {port} (MASTER_PORT)" in found.stderr and "--master_port N" in found.stderr
    assert "Traceback" not in found.stderr


def test_ranks_that_do_not_come(config: Path) -> None:
    found = run(
        sys.executable, "-m", "moemm", "train", str(config), "--deepspeed.timeout_s", "2",
        RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
    )  # fmt: skip
    assert found.returncode == 6
    assert "could not join the others" in found.stderr and "Traceback" not in found.stderr


def test_ctrl_c_on_the_command_line(config: Path) -> None:
    output = str(config.parent / "stopped")
    arguments = ["train", str(config), "--train.output", output, "--train.steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "moemm", *arguments], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130
    stopped = re.search(r"stopped by SIGINT; saved step (\d+)\. Go on with: moemm (.*) --resume", rest)
    assert stopped is not None, rest
    assert stopped.group(2) == " ".join(arguments)
    assert (Path(output) / "checkpoints" / f"step_{int(stopped.group(1)):06d}" / "manifest.json").exists()
