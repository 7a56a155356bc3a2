"""A hostfile, by DeepSpeed's launcher over a real ssh and by torchrun: two hosts train like one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import why_no_hosts
from two_hosts import ADDRESSES, Hosts, two_hosts

from moemm.testing.tiny import tiny_config

pytestmark = [
    pytest.mark.skipif(bool(why_no_hosts()), reason=f"two hosts do NOT run here: {why_no_hosts()}"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("hosts")
    tiny_config(place, train={"output": "run", "steps": 6}, deepspeed={"zero_stage": 2}, model={"dropout": 0.1})
    (place / "hostfile").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    return place


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("namespaces")) as found:
        yield found


def losses(run: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "train"]


@pytest.fixture(scope="module")
def one(hosts: Hosts, folder: Path) -> list[tuple[int, float]]:
    """The losses of two ranks on one host."""
    hosts.run(
        "moemm", "launch", "local", "tiny.yaml", "--ranks", "2", "--train.output", "one",
        cwd=folder, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert len(losses(folder / "one")) == 6
    return losses(folder / "one")


def test_deepspeed_on_two_hosts_gives_the_losses_of_one(
    hosts: Hosts, folder: Path, one: list[tuple[int, float]]
) -> None:
    said = hosts.run(
        "moemm", "launch", "deepspeed", "tiny.yaml", "--hostfile", "hostfile", "--train.output", "two",
        cwd=folder, GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert "10.77.0.1: " in said and "10.77.0.2: " in said, "pdsh puts the host before each line"
    assert "2 rank(s) on cpu, ZeRO 2" in said
    assert losses(folder / "two") == one


@pytest.mark.soak
def test_torchrun_on_two_hosts_gives_the_losses_of_one(
    hosts: Hosts, folder: Path, one: list[tuple[int, float]]
) -> None:
    command = ["moemm", "launch", "torchrun", "tiny.yaml", "--hostfile", "hostfile", "--train.output", "torch"]
    environ = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    both = [hosts.start(*command, cwd=folder, other=other, **environ) for other in (False, True)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "2 rank(s) on cpu, ZeRO 2" in said[0] and "rank(s)" not in said[1], "each knew its place in the hostfile"
    assert losses(folder / "torch") == one


@pytest.mark.soak
@pytest.mark.usefixtures("one")
def test_the_ranks_exit_code_comes_back_through_pdsh(hosts: Hosts, folder: Path) -> None:
    done = hosts.start(
        "moemm", "launch", "deepspeed", "tiny.yaml", "--hostfile", "hostfile", "--train.output", "one",
        cwd=folder, GLOO_SOCKET_IFNAME="eth0", OMP_NUM_THREADS="1",
    )  # fmt: skip
    said = done.communicate(timeout=300)[0]
    assert done.returncode == 2 and "error: " in said and "--resume" in said, "the folder holds a finished run"
