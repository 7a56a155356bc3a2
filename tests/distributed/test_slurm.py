"""A real SLURM: submitted, preempted, queued again, resumed; and its other launchers."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machine import why_no_slurm
from slurm_cluster import Cluster, cluster, until

from moemm.testing.tiny import tiny_config

pytestmark = [
    pytest.mark.skipif(bool(why_no_slurm()), reason=f"SLURM does NOT run here: {why_no_slurm()}"),
    pytest.mark.timeout(900),
]
ENDLESS = 1_000_000
JOB = ("--nodes", "2", "--gpus-per-node", "0", "--time", "60", "--save-s", "100", "--partition", "low")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    with cluster() as found:
        yield found


def write_config(folder: Path, **train: Any) -> str:
    """A tiny run with everything that must come back after a resume: dropout, two ranks, sharded optimizer states."""
    sections = {"model": {"dropout": 0.1}, "deepspeed": {"zero_stage": 1}}
    config = tiny_config(folder, train={"output": "job", **train}, **sections)
    return config.path.name


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every complete line that training wrote."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return [(line["step"], line["loss"]) for line in found if line["event"] == "train"]


def steps(run: Path) -> int:
    found = losses(run)
    return found[-1][0] if found else 0


def submit(slurm: Cluster, folder: Path, *arguments: str) -> str:
    said = slurm.run("moemm", "launch", "slurm", *arguments, cwd=folder).stdout
    number = re.match(r"job (\d+): 2 node\(s\) x 1 rank\(s\)", said)
    assert number is not None and f"squeue --job {number[1]}" in said
    return number[1]


def train_beside(slurm: Cluster, folder: Path, config: str, *, until_step: int) -> list[tuple[int, float]]:
    """The same run without SLURM and without an interruption, up to a step; ended by Ctrl-C."""
    command = [sys.executable, "-m", "moemm", "launch", "local", config, "--ranks", "2", "--train.output", "beside"]
    process = subprocess.Popen(command, cwd=folder, env=slurm.environ, stdout=subprocess.PIPE, text=True)
    try:
        until(lambda: steps(folder / "beside") >= until_step or process.poll() is not None, "the uninterrupted run")
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.count("stopped by SIGINT; saved step") == 1
    return losses(folder / "beside")


def test_a_preempted_job_goes_on_as_if_nothing_had_been(slurm: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=ENDLESS)
    job = submit(slurm, tmp_path, config, *JOB, "--requeue")
    until(lambda: steps(tmp_path / "job") >= 5, "the job's fifth step")
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.start_now(job)
    log = tmp_path / f"tiny-{job}.out"
    saved = int(re.findall(r"stopped by SIGUSR1; saved step (\d+)\.", log.read_text())[0])
    until(lambda: steps(tmp_path / "job") >= saved + 20, "20 steps after the resume")
    slurm.run("scancel", job)
    assert slurm.ends(job) == "CANCELLED", "a job that a user cancels is not queued again"
    assert log.read_text().count("requeue: ended with code 85") == 1
    assert f"(step {saved})" in log.read_text(), "it went on where it had stopped"
    assert slurm.show(job)["Restarts"] == "1"
    found = losses(tmp_path / "job")
    assert [step for step, _ in found] == list(range(1, found[-1][0] + 1)), "each step once, without a gap"
    beside = train_beside(slurm, tmp_path, config, until_step=saved + 20)
    assert found[: saved + 20] == beside[: saved + 20]
