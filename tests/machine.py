"""What this machine must have for some tests, such as those that start a SLURM cluster: "" or why it has not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
SLURM = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "setpriv", "unshare")
HOSTS = ("ip", "sshd", "ssh", "ssh-keygen", "pdsh", "setpriv", "unshare")


@cache
def why_no_slurm() -> str:
    """Why no slurmctld, slurmd and munged can run here."""
    return _missing(SLURM, "slurmctld slurmd slurm-client munge") or _refused("--pid", "--mount-proc")


@cache
def why_no_hosts() -> str:
    """Why no two hosts, with a network and an sshd each, can be made here."""
    return _missing(HOSTS, "iproute2 openssh-server openssh-client pdsh") or _refused("--pid", "--mount-proc", "--net")


@cache
def why_no_bits() -> str:
    """Why golden curves cannot be compared to the last bit here."""
    from moemm.testing.kind import differing, machine_kind

    files = sorted((Path(__file__).parent / "golden").glob("*.json"))
    made_on = [json.loads(path.read_text(encoding="utf-8"))["machine"] for path in files]
    return next(filter(None, (differing(machine_kind(), kind) for kind in made_on)), "")


def _missing(programs: tuple[str, ...], packages: str) -> str:
    missing = [name for name in programs if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)} (apt-get install --no-install-recommends {packages}; .ci/run does)"
    return "" if os.geteuid() == 0 else "not root"


def _refused(*kinds: str) -> str:
    found = subprocess.run(["unshare", "--fork", *kinds, "true"], capture_output=True, text=True, check=False)
    return f"no namespaces: {found.stderr.strip()}" if found.returncode else ""
