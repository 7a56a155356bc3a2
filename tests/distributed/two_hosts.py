"""Two hosts on this machine: a network each, joined by a cable, with a real sshd on both.

They live in namespaces whose first process the kernel kills when the test process ends, for whatever reason; with it
go the sshd, every process that ran there, the network and the folder /run that only they see.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from machine import PATH
from slurm_cluster import LAUNCHED, PATIENCE_S, ROOT, until

ADDRESSES = ("10.77.0.1", "10.77.0.2")

SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""

SSH = """\
Host *
    IdentityFile {folder}/key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""

SETUP = """\
set -e
mount -t tmpfs none /run
mkdir -p /run/sshd
ip netns add other
ip link add eth0 type veth peer name eth0 netns other
ip address add 10.77.0.1/24 dev eth0
ip -n other address add 10.77.0.2/24 dev eth0
for place in "" "-n other"; do
    ip $place link set lo up
    ip $place link set eth0 up
done
sshd=$(command -v sshd)
"$sshd" -D -e -f {folder}/sshd_config &
ip netns exec other "$sshd" -D -e -f {folder}/sshd_config &
touch {folder}/ready
wait
"""


@dataclass(frozen=True)
class Hosts:
    """Runs commands on the first host."""

    environ: dict[str, str]
    inside: int

    def start(self, *command: str, cwd: Path, other: bool = False, **changes: str) -> subprocess.Popen[str]:
        """Start it, on the second host where `other`; `moemm` is `python -m moemm`."""
        words = [sys.executable, "-m", "moemm", *command[1:]] if command[0] == "moemm" else list(command)
        enter = ["nsenter", f"--target={self.inside}", "--net", "--pid", "--mount", "env", f"--chdir={cwd}"]
        return subprocess.Popen(
            [*enter, *(["ip", "netns", "exec", "other"] if other else []), *words],  # chdir: inside, not before
            env={**self.environ, **changes},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, cwd: Path, **changes: str) -> str:
        """Run it and return what it printed; AssertionError where it fails."""
        process = self.start(*command, cwd=cwd, **changes)
        said = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, f"{command}: {process.returncode}\n{said}"
        return said


@contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Make them; `folder` gets their keys and configurations."""
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "ssh"  # DeepSpeed and pdsh take the ssh of PATH; ~/.ssh is not ours to change
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)
    environ = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    environ["PATH"] = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), PATH])
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    guard = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--net"]
    with (folder / "hosts.log").open("w") as log:
        first = subprocess.Popen(
            [*guard, "bash", "-c", SETUP.format(folder=folder)], env=environ, stdout=log, stderr=log, cwd="/"
        )
    try:
        until(lambda: (folder / "ready").exists() or first.poll() is not None, "two hosts", patience_s=30)
        assert first.poll() is None, (folder / "hosts.log").read_text()
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        yield Hosts(environ, int(children[0]))
    finally:
        first.kill()
        first.wait()
