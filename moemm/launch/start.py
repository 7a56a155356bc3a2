"""Ranks without a scheduler: templates/local.sh and multinode.sh, which the process becomes."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moemm.errors import LaunchError
from moemm.launch.hostfile import read_hostfile
from moemm.launch.template import TEMPLATES

LAUNCHERS = ("local", "torchrun", "deepspeed")


@dataclass(frozen=True, slots=True)
class Start:
    """A command, the variables that it gets beside those of this process, and how many ranks it makes."""

    command: list[str]
    environ: dict[str, str]
    ranks: int

    def text(self) -> str:
        """As a line for a shell."""
        return shlex.join([*(f"{key}={value}" for key, value in self.environ.items()), *self.command])


def plan_start(
    launcher: str,
    *,
    arguments: Sequence[str],
    ranks: int = 0,
    hostfile: Path | None = None,
    port: int = 0,
    node_rank: int = -1,
) -> Start:
    """How to start `moemm train ARGUMENTS` by "local", "torchrun" or "deepspeed".

    ranks: of this machine, or, where it is given beside a hostfile, what the hosts must add up to. port: where ranks
    meet; 0 chooses. node_rank: this host's index in the hostfile; negative: found by its names.
    Raises LaunchError for values that start nothing.
    """
    if not 0 <= port < 65536:
        raise LaunchError(f"--port is {port}; it must be a TCP port, 1 to 65535, or 0 to choose one.")
    hosts = read_hostfile(hostfile) if hostfile else {}
    total = sum(hosts.values()) or ranks
    if ranks < 0 or total < 1:
        raise LaunchError(f"--ranks is {ranks}; give 1 or more{'' if launcher == 'local' else ', or a --hostfile'}.")
    if hosts and ranks not in (0, total):
        raise LaunchError(f"--ranks is {ranks}, but the hosts of {hostfile} have {total} slots; leave --ranks out.")
    if node_rank >= len(hosts) and node_rank >= 0:
        raise LaunchError(f"--node-rank is {node_rank}; the hostfile has hosts 0 to {len(hosts) - 1}.")
    environ = {"PYTHON": sys.executable}
    environ |= {"MASTER_PORT": str(port)} if port else {}
    environ |= {"NODE_RANK": str(node_rank)} if node_rank >= 0 else {}
    name, first = ("local.sh", []) if launcher == "local" else ("multinode.sh", [launcher])
    script = [str(TEMPLATES / name), *first, str(hostfile or ranks), *arguments]
    return Start(["bash", *script], environ, total)


def start(planned: Start, environ: Mapping[str, str] | None = None) -> None:
    """Become that command: it does not return, and signals and exit codes are the script's own.

    environ: what its variables are added to; those of this process by default.
    """
    sys.stdout.flush()
    os.execvpe(planned.command[0], planned.command, {**(os.environ if environ is None else environ), **planned.environ})
