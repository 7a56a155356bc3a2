"""Ranks without a scheduler: what is refused, and what local.sh does with signals and exit codes."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from moemm.errors import LaunchError
from moemm.launch import plan_start, read_hostfile
from moemm.launch.template import TEMPLATES

# In place of `python -u -m moemm train CONFIG ...`: what a rank does stands in a file of its own.
RANK = """\
#!/bin/bash
[[ $1 == -c ]] && echo 4711 && exit
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >"rank_$RANK.txt"
source "./do_$RANK.sh"
"""
WAITS = "trap 'echo {name} >>got_$RANK.txt; exit {code}' {name}\nwhile :; do sleep 0.05; done\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rank").write_text(RANK)
    (tmp_path / "rank").chmod(0o755)
    return tmp_path


def local(folder: Path, *ranks: str, **environ: str) -> subprocess.Popen[str]:
    for rank, text in enumerate(ranks):
        (folder / f"do_{rank}.sh").write_text(text)
    return subprocess.Popen(
        ["bash", str(TEMPLATES / "local.sh"), str(len(ranks)), "a.yaml", "--name", "b c"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(folder / "rank"), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def started(folder: Path, ranks: int) -> None:
    end = time.monotonic() + 30
    while len(list(folder.glob("rank_*.txt"))) < ranks:
        assert time.monotonic() < end, "ranks did not start"
        time.sleep(0.05)
    time.sleep(0.2)  # for their traps


def test_ranks_get_their_variables(folder: Path) -> None:
    process = local(folder, "exit 0", "exit 0")
    assert process.communicate(timeout=30)[0] == "" and process.returncode == 0
    words = "-u -m moemm train a.yaml --name b c"
    assert (folder / "rank_1.txt").read_text() == f"1 1 2 2 127.0.0.1:4711 {words}\n"
    assert local(folder, "exit 0", MASTER_PORT="5").wait(timeout=30) == 0
    assert ":5 -u" in (folder / "rank_0.txt").read_text()


@pytest.mark.parametrize(
    ("name", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 85)], ids=lambda x: str(x)
)
def test_a_signal_reaches_each_rank_once(folder: Path, name: signal.Signals, code: int) -> None:
    waits = WAITS.format(name=name.name[3:], code=code)
    process = local(folder, waits, waits)
    started(folder, 2)
    process.send_signal(name)
    assert process.wait(timeout=30) == code
    assert [(folder / f"got_{rank}.txt").read_text() for rank in (0, 1)] == [f"{name.name[3:]}\n"] * 2


def test_the_first_failure_gives_the_exit_code(folder: Path) -> None:
    assert local(folder, "sleep 0.6; exit 1", "exit 7").wait(timeout=30) == 7


def test_ranks_that_stay_are_killed(folder: Path) -> None:
    process = local(folder, "trap '' TERM INT; while :; do sleep 0.1; done", "exit 3", GRACE_S="1")
    said = process.communicate(timeout=30)[0]
    assert process.returncode == 3
    assert "local.sh: 1 rank(s) still there 1 s after another ended with code 3: killed" in said


def test_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\na slots=2\n\nb   slots=4  # more\n")
    assert read_hostfile(path) == {"a": 2, "b": 4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("a slots=2\nb\n", "hosts:2: 'b' must be HOST slots=RANKS"),
        ("a slots=0", "hosts:1: 'a slots=0'"),
        ("a slots=2 max=3", "hosts:1"),
        ("a slots=1\na slots=1", "hosts:2: the host a is named twice"),
    ],
)
def test_hostfiles_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(LaunchError, match=said):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "--ranks is 0; give 1 or more"),
        ({"ranks": -2}, "--ranks is -2"),
        ({"ranks": 2, "port": 70000}, "--port is 70000"),
        ({"ranks": 2, "node_rank": 0}, "--node-rank is 0"),
        ({"hostfile": "hosts", "ranks": 3}, "--ranks is 3, but the hosts of .* have 4 slots"),
        ({"hostfile": "hosts", "node_rank": 2}, "--node-rank is 2; the hostfile has hosts 0 to 1"),
        ({"hostfile": "host"}, "no such hostfile(.|\n)*did you mean .*hosts"),
    ],
)
def test_starts_that_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    change = {key: tmp_path / value if key == "hostfile" else value for key, value in change.items()}
    with pytest.raises(LaunchError, match=said):
        plan_start("torchrun", arguments=["a.yaml"], **change)


def test_a_planned_start(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    found = plan_start("torchrun", arguments=["a.yaml"], hostfile=tmp_path / "hosts", port=5, node_rank=1)
    assert found.ranks == 4
    assert found.command[1:] == [str(TEMPLATES / "multinode.sh"), "torchrun", str(tmp_path / "hosts"), "a.yaml"]
    assert (found.environ["MASTER_PORT"], found.environ["NODE_RANK"]) == ("5", "1")
    alone = plan_start("local", arguments=["a.yaml"], ranks=2)
    assert alone.command[1:] == [str(TEMPLATES / "local.sh"), "2", "a.yaml"] and set(alone.environ) == {"PYTHON"}


def test_a_host_that_is_not_in_the_hostfile(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a.invalid slots=2\nb.invalid slots=2\n")
    done = subprocess.run(
        ["bash", str(TEMPLATES / "multinode.sh"), "torchrun", str(tmp_path / "hosts"), "a.yaml"],
        capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "PYTHON": "false"},
    )  # fmt: skip
    assert done.returncode == 6 and "is this machine" in done.stderr and "Set NODE_RANK" in done.stderr
