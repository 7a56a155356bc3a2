from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moemm.distributed import agree, broadcast_object, gather_objects, max_over_ranks, on_main, sum_over_ranks
from moemm.distributed import environment as module
from moemm.distributed.environment import first_host, free_port, launch_variables, prepare_environment
from moemm.errors import HealthError, LaunchError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[07-08]",
    "SLURM_JOB_ID": "123456",
}


def test_without_a_launcher_it_is_one_process() -> None:
    found = launch_variables({})
    assert int(found.pop("MASTER_PORT")) > 0
    assert found == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert launch_variables({"MASTER_PORT": "5"})["MASTER_PORT"] == "5"


def test_launchers_variables_are_taken_as_they_are() -> None:
    assert launch_variables({**TORCHRUN, **SRUN, "HOME": "/"}) == TORCHRUN


def test_srun_is_mapped() -> None:
    assert launch_variables(SRUN) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n07",
        "MASTER_PORT": str(12000 + 123456 % 20000),
    }
    assert launch_variables({**SRUN, "MASTER_ADDR": "a", "MASTER_PORT": "7"})["MASTER_ADDR"] == "a"


def test_a_batch_script_itself_is_one_process() -> None:
    inside = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    assert launch_variables(inside)["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007,009-012],x3", "gpu007"),
        ("a-b-1,c", "a-b-1"),
        ("10.0.0.1", "10.0.0.1"),
        ("n[3,5]-ib,x", "n3-ib"),
        ("r[1-2]n[04-06,9]", "r1n04"),
    ],
)
def test_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"MASTER_PORT": None}, "but not MASTER_PORT"),
        ({"WORLD_SIZE": None, "MASTER_ADDR": None}, "RANK=1, LOCAL_RANK=1 but not WORLD_SIZE, MASTER_ADDR"),
        ({"RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "one"}, "RANK='one' is no whole number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ],
)
def test_contradictions_are_launch_errors(change: dict[str, str | None], said: str) -> None:
    environ = {key: value for key, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(LaunchError, match=said):
        launch_variables(environ)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SLURM_PROCID": None}, "SLURM_PROCID=.not set."),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "WORLD_SIZE='many' is no whole number"),
        ({"SLURM_PROCID": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
    ],
)
def test_what_srun_did_not_set_is_a_launch_error(change: dict[str, str | None], said: str) -> None:
    environ = {key: value for key, value in {**SRUN, **change}.items() if value is not None}
    with pytest.raises(LaunchError, match=said):
        launch_variables(environ)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    before = dict(os.environ)
    try:
        prepare_environment()
        assert os.environ["DS_ACCELERATOR"] == "npu"
        assert os.environ["TORCH_EXTENSIONS_DIR"].startswith((sys.prefix, str(Path.home())))
        assert os.environ["WORLD_SIZE"] == "1"
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_a_taken_port_is_named_with_a_free_one() -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"Port {port} \(MASTER_PORT\).*--master_port N.*\d+ is free now"):
            module._refuse_taken_port(port)
    module._refuse_taken_port(free_port())


def test_a_process_started_by_one_that_trains_alone_may_train_too() -> None:
    join = "from moemm.distributed import connect; connect(timeout_s=20)"
    child = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {join!r}]).returncode)"
    before = {key: value for key, value in os.environ.items() if key not in (*module._RANK_KEYS, "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", f"{join}\n{child}"], env=before, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_alone_collectives_send_nothing() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert torch.equal(sum_over_ranks(tensor), tensor) and not sum_over_ranks(tensor).requires_grad
    assert max_over_ranks([3, -4]) == [3, -4]
    assert agree(True) and not agree(False)
    assert broadcast_object({"a": 1}) == {"a": 1}
    assert gather_objects("x") == ["x"]
    assert on_main(lambda: 5) == 5
    with pytest.raises(HealthError):
        on_main(lambda: (_ for _ in ()).throw(HealthError("no")))
