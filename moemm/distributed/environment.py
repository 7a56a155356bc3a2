"""Where this process stands: one process without a launcher, `deepspeed`, `torchrun`, or `srun`.

All four end in the same five variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and one process group.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moemm.distributed.groups import forget_expert_groups
from moemm.errors import LaunchError

_RANK_KEYS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_NEW_PORT = "choose another: `--master_port N` (deepspeed, torchrun) or the environment variable MASTER_PORT=N"


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others. device: where its model lives."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes the run's own files."""
        return self.rank == 0


def launch_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The five variables for this process, from what a launcher left in `environ`.

    Returns only the variables; raises LaunchError where the launcher's own ones contradict themselves.
    """
    if any(key in environ for key in _RANK_KEYS[:2]):
        found = _from_launcher(environ)
    elif environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        found = _from_slurm(environ)
    else:
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        found["MASTER_ADDR"] = environ.get("MASTER_ADDR", "127.0.0.1")
        found["MASTER_PORT"] = environ.get("MASTER_PORT") or str(free_port())
    _check(found)
    return found


def _from_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    missing = [key for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if key not in environ]
    if missing:
        given = ", ".join(f"{key}={environ[key]}" for key in _RANK_KEYS if key in environ)
        raise LaunchError(
            f"The environment sets {given} but not {', '.join(missing)}. Start with `deepspeed`, `torchrun` or `srun`, "
            "which set them all, or unset them to train in one process."
        )
    found = {key: environ[key] for key in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    found["LOCAL_RANK"] = environ.get("LOCAL_RANK", environ["RANK"])
    return found


def _from_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    # SLURM_STEP_*: only `srun` sets them, by hand or through `deepspeed --launcher slurm`. A batch script itself has
    # SLURM_PROCID=0 and SLURM_NTASKS=N but no peers.
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    job = environ.get("SLURM_JOB_ID", "0")
    if "SLURM_PROCID" not in environ or not job.isdigit():
        raise LaunchError(
            f"SLURM_STEP_NUM_TASKS={environ['SLURM_STEP_NUM_TASKS']} says that `srun` started this process, but "
            f"SLURM_PROCID={environ.get('SLURM_PROCID', '(not set)')}, SLURM_JOB_ID={job}. Start it with `srun`, or "
            "unset SLURM_STEP_NUM_TASKS to train in one process."
        )
    # Below the ports that Linux hands out by itself (32768 and up), which anything on the node may have.
    port = 12000 + int(job) % 20000
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR", first_host(nodes)),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
    }


def first_host(nodes: str) -> str:
    """First name of a SLURM node list: `n[07-09,12],m1` -> `n07`, `r[1-2]n[3,4]-ib` -> `r1n3-ib`."""
    match = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    return nodes if match is None else re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group())


def _check(found: Mapping[str, str]) -> None:
    for key in (*_RANK_KEYS, "MASTER_PORT"):
        if not found[key].isdigit():
            raise LaunchError(f"{key}={found[key]!r} is no whole number; the launcher sets it, unset it by hand.")
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise LaunchError(f"RANK={found['RANK']} must be below WORLD_SIZE={found['WORLD_SIZE']}.")


def free_port() -> int:
    """A TCP port of this host that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def prepare_environment() -> None:
    """Set the variables that must stand before deepspeed is imported. What the user has set stays."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_extensions_folder()))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with it
    os.environ.update(launch_variables(os.environ))


def _extensions_folder() -> Path:
    # Private to the environment: a build lock or an op of another torch in the shared default hangs or breaks a start.
    prefix = Path(sys.prefix)
    if os.access(prefix, os.W_OK):
        return prefix / "var" / "moemm" / "torch_extensions"
    digest = hashlib.sha256(str(prefix).encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "moemm" / digest / "torch_extensions"


def connect(*, timeout_s: float) -> World:
    """Join the process group that the environment describes; `timeout_s` bounds every later collective.

    A second call in a process returns the same world: DeepSpeed holds on to the first group.

    Raises LaunchError when the port is taken or the other ranks do not come.
    """
    prepare_environment()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _bound_groups(timeout_s)
        _init_process_group(rank, size, timeout_s, device)
        atexit.register(disconnect)
    return World(rank, local_rank, size, device)


def _bound_groups(timeout_s: float) -> None:
    # DeepSpeed makes groups of its own without saying how long to wait: a rank that hangs there would hang all others
    # for torch's default of 30 minutes. new_group looks these names up when it is called.
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(dist.distributed_c10d, name, timedelta(seconds=timeout_s))


def _init_process_group(rank: int, size: int, timeout_s: float, device: torch.device) -> None:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0 and size > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _refuse_taken_port(port)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    if size == 1:  # nobody to meet: no port, so that a process started from this one may have its own
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    try:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"Rank {rank} of {size} could not join the others at {address}:{port} within {timeout_s:g} s: "
            f"{str(error).splitlines()[0]}. Check that all {size} ranks were started with the same MASTER_ADDR and "
            f"MASTER_PORT and can reach that host, or that no other job uses the port ({_NEW_PORT})."
        ) from error


def _refuse_taken_port(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(
                f"Port {port} (MASTER_PORT), where rank 0 meets the others, is not free on {socket.gethostname()}: "
                f"{error.strerror}. C{_NEW_PORT[1:]}; for example {free_port()} is free now."
            ) from error


def disconnect() -> None:
    """Leave the process group, if this process is in one."""
    forget_expert_groups()
    if dist.is_initialized():
        dist.destroy_process_group()
