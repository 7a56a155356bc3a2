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
import yaml
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


def in_order(run: Path) -> bool:
    found = [step for step, _ in losses(run)]
    return found == list(range(1, len(found) + 1))


@pytest.mark.soak
def test_a_time_limit_saves_and_queues_again(slurm: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=ENDLESS)
    job = submit(slurm, tmp_path, config, *JOB, "--requeue", "--time", "2", "--save-s", "30")
    until(lambda: slurm.show(job).get("Restarts") == "1", "the time limit")
    log = tmp_path / f"tiny-{job}.out"
    saved = int(re.findall(r"stopped by SIGUSR1; saved step (\d+)\.", log.read_text())[0])
    slurm.start_now(job)
    until(lambda: steps(tmp_path / "job") >= saved + 5, "five more steps")
    slurm.run("scancel", "--signal=USR1", job)
    until(lambda: slurm.show(job).get("Restarts") == "2", "the user's signal")
    slurm.run("scancel", job)
    assert slurm.ends(job) == "CANCELLED" and f"(step {saved})" in log.read_text()
    assert in_order(tmp_path / "job")


@pytest.mark.soak
def test_without_requeue_a_job_saves_and_ends(slurm: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=ENDLESS)
    more = ("--cpus-per-rank", "2", "--sbatch", "exclusive", "--sbatch", "comment=me")
    job = submit(slurm, tmp_path, config, *JOB, *more)
    until(lambda: steps(tmp_path / "job") >= 2, "the second step")
    assert (slurm.show(job)["CPUs/Task"], slurm.show(job)["Comment"]) == ("2", "me")
    slurm.run("scancel", "--signal=USR1", job)
    assert slurm.ends(job) == "FAILED"
    assert slurm.show(job)["ExitCode"] == "85:0" and slurm.show(job)["Restarts"] == "0"
    assert "stopped by SIGUSR1; saved step" in (tmp_path / f"tiny-{job}.out").read_text()


@pytest.mark.soak
def test_a_failure_is_not_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=ENDLESS)
    (tmp_path / "tones.h5").write_bytes(b"no HDF5")
    job = submit(slurm, tmp_path, config, *JOB, "--requeue")
    assert slurm.ends(job) == "FAILED"
    assert slurm.show(job)["ExitCode"] == "3:0" and slurm.show(job)["Restarts"] == "0"


@pytest.mark.soak
def test_an_array_trains_each_value_in_its_own_folder(slurm: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=3)
    job = submit(slurm, tmp_path, config, *JOB, "--array", "train.lr=1e-3,1e-4", "--array", "model.dim=16,32")
    runs = [tmp_path / "job-sweep" / f"lr_{lr}-dim_{dim}" for lr in ("1e-3", "1e-4") for dim in (16, 32)]
    until(lambda: all((run / "summary.json").exists() for run in runs), "four runs", patience_s=600)
    assert [len(losses(run)) for run in runs] == [3, 3, 3, 3]
    found = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    assert [(one["train"]["lr"], one["model"]["dim"]) for one in found] == [
        (0.001, 16), (0.001, 32), (0.0001, 16), (0.0001, 32)
    ]  # fmt: skip
    assert [slurm.ends(f"{job}_{task}") for task in range(4)] == ["COMPLETED"] * 4
    assert len(list(tmp_path.glob(f"tiny-{job}_*.out"))) == 4


DEEPSPEED = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output=deepspeed.out
scontrol show hostnames | sed 's/$/ slots=1/' >hostfile
deepspeed --hostfile hostfile --launcher slurm --no_ssh_check --master_addr "$(hostname)" \
    "$(command -v moemm)" train tiny.yaml
"""


@pytest.mark.soak
def test_deepspeeds_slurm_launcher_in_an_allocation(slurm: Cluster, tmp_path: Path) -> None:
    write_config(tmp_path, steps=3)
    (tmp_path / "job.sbatch").write_text(DEEPSPEED)
    job = slurm.run("sbatch", "--parsable", "job.sbatch", cwd=tmp_path).stdout.strip()
    said = slurm.ends(job), (tmp_path / "deepspeed.out").read_text()
    assert said[0] == "COMPLETED" and "2 rank(s) on cpu, ZeRO 1" in said[1], said
    assert [step for step, _ in losses(tmp_path / "job")] == [1, 2, 3]


@pytest.mark.soak
def test_preempted_before_its_first_step_it_is_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=ENDLESS)
    job = submit(slurm, tmp_path, config, *JOB, "--requeue")
    listed = ("squeue", "--steps", "--noheader", "--jobs", job, "--format=%i")
    until(lambda: f"{job}.0" in slurm.run(*listed).stdout.split(), "the job's ranks to start")
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm.start_now(job)
    assert (tmp_path / f"tiny-{job}.out").read_text().count("requeue: ended with code 138") == 1
    until(lambda: steps(tmp_path / "job") >= 2, "the second step")
    slurm.run("scancel", job)
    assert slurm.ends(job) == "CANCELLED" and slurm.show(job)["Restarts"] == "1"


@pytest.mark.soak
def test_preempted_without_a_word_it_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=ENDLESS)
    with cluster(grace_s=0, tells_users=False) as slurm:
        job = submit(slurm, tmp_path, config, *JOB, "--requeue")
        until(lambda: steps(tmp_path / "job") >= 5, "the job's fifth step")
        slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
        slurm.start_now(job)
        reached = steps(tmp_path / "job")
        until(lambda: steps(tmp_path / "job") >= reached + 5, "five more steps")
        assert slurm.show(job)["Restarts"] == "1"
    print((tmp_path / f"tiny-{job}.out").read_text())
    assert in_order(tmp_path / "job")
