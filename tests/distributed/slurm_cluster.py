"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd, in a temporary folder.

All of it runs in a process namespace of its own, whose first process the kernel kills when the test process ends, for
whatever reason; with it go the daemons and every process of every job.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from machine import PATH

from moemm.distributed.environment import free_port

ROOT = Path(__file__).parents[2]
PATIENCE_S = 200.0
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

CONF = """\
ClusterName=moemm
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
MessageTimeout=60
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName={first} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s} MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""

DAEMONS = """\
munged --foreground --force --socket={folder}/munge --key-file={folder}/key --pid-file={folder}/munge.pid \
    --log-file={folder}/munge.log --seed-file={folder}/seed &
slurmctld -D -c -f {folder}/slurm.conf &
slurmd -D -N {first} -f {folder}/slurm.conf &
slurmd -D -N {second} -f {folder}/slurm.conf &
wait
"""


@dataclass(frozen=True)
class Cluster:
    """Runs commands as a user of the cluster would: SLURM's own, and `moemm` as `python -m moemm`."""

    environ: dict[str, str]

    def run(self, *command: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "moemm", *command[1:]] if command[0] == "moemm" else list(command)
        done = subprocess.run(
            words, cwd=cwd, env=self.environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says; nothing for a job that it no longer knows."""
        text = self.run("scontrol", "show", "job", job, check=False).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def ends(self, job: str) -> str:
        """Wait until the job has ended; its last state."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        until(lambda: self.show(job).get("JobState") in final, f"the end of job {job}")
        return self.show(job)["JobState"]

    def start_now(self, job: str) -> None:
        """A job that was queued again waits for two minutes: not this one."""
        until(lambda: self.show(job).get("JobState") == "PENDING", f"job {job} to be queued again")
        until(lambda: self._started(job), f"job {job} to start again")

    def _started(self, job: str) -> bool:
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return self.show(job).get("JobState") == "RUNNING"


def until(reached: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Wait until `reached()`; AssertionError after `patience_s`. pytest shows the times of a test that fails."""
    start = time.monotonic()
    while not reached():
        assert time.monotonic() - start < patience_s, f"waited {patience_s:g} s for {what}"
        time.sleep(0.3)
    print(f"{time.monotonic() - start:6.1f} s: {what}")


@contextmanager
def cluster(*, grace_s: int = 120, tells_users: bool = True) -> Iterator[Cluster]:
    """Start it, and end it with everything that runs on it.

    grace_s: what a job has left when it is preempted. tells_users: it then gets the signal of its --signal at once.
    """
    parameters = "SlurmctldParameters=preempt_send_user_signal" if tells_users else ""
    folder = Path(tempfile.mkdtemp(prefix="moemm-slurm-"))
    folder.chmod(0o711)
    host = socket.gethostname().partition(".")[0]
    # The first node has the name of this machine, which is known; no name of the second one is ever looked up.
    facts = {"folder": folder, "host": host, "first": host, "second": f"{host}-b"}
    rules = {"parameters": parameters, "grace_s": grace_s, "ports": [free_port() for _ in range(3)]}
    (folder / "slurm.conf").write_text(CONF.format(**facts, **rules))
    (folder / "state").mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHED and not key.startswith("SLURM")}
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), PATH]),
        "PYTHONPATH": search,
        "OMP_NUM_THREADS": "1",
        "SLURM_CONF": str(folder / "slurm.conf"),
    }
    guard = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--pid", "--kill-child", "--mount-proc"]
    with (folder / "daemons.log").open("w") as log:
        daemons = subprocess.Popen(
            [*guard, "bash", "-c", DAEMONS.format(**facts)], env=environ, stdout=log, stderr=log, cwd="/"
        )
    try:
        found = Cluster(environ)
        until(lambda: _idle(found), f"two idle nodes; see {folder}", patience_s=60)
        yield found
    finally:
        daemons.kill()
        daemons.wait()
    shutil.rmtree(folder, ignore_errors=True)  # kept where something failed: it holds the daemons' logs


def _idle(found: Cluster) -> bool:
    shown = found.run("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D", check=False)
    return shown.stdout.split() == ["2"]
