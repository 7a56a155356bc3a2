"""A SLURM job: templates/job.sbatch filled in, and handed to `sbatch`."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from moemm.errors import LaunchError
from moemm.launch.sweep import Point
from moemm.launch.template import TEMPLATES, fill

_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<of_day>\d+(?::\d+){0,2})|(?P<short>\d+(?::\d+){0,2})|UNLIMITED|INFINITE)")


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """What the job asks SLURM for. gpus_per_node 0: none; ranks_per_node 0: as many as GPUs, or 1; an empty text, or
    cpus_per_rank 0: SLURM's default. save_s: seconds before the time limit at which ranks are told to save.
    """

    name: str
    nodes: int = 1
    gpus_per_node: int = 8
    ranks_per_node: int = 0
    cpus_per_rank: int = 0
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    qos: str = ""
    sbatch: Sequence[str] = ()
    container: str = ""
    mount: Sequence[str] = ()
    requeue: bool = False
    save_s: int = 120

    def __post_init__(self) -> None:
        """Raises LaunchError for a value that SLURM would refuse, or that would start nothing."""
        for name, least in (("nodes", 1), ("gpus_per_node", 0), ("ranks_per_node", 0), ("cpus_per_rank", 0)):
            if getattr(self, name) < least:
                raise LaunchError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {least} or more.")
        for name in ("name", "partition", "account", "qos", "container", "sbatch", "mount"):
            given = getattr(self, name)
            if any("\n" in text or "\r" in text for text in ([given] if isinstance(given, str) else given)):
                raise LaunchError(f"--{name} {given!r} is more than one line, which would become lines of the script.")
        limit = seconds(self.time)
        if self.save_s < 1 or (limit is not None and self.save_s >= limit):
            raise LaunchError(
                f"--save-s is {self.save_s}: ranks must be told to save at least 1 s before the end of the job, and "
                f"after its start: its --time is {self.time}."
            )

    @property
    def ranks(self) -> int:
        """Ranks on all nodes together."""
        return self.nodes * self.local_ranks

    @property
    def local_ranks(self) -> int:
        """Ranks on a node."""
        return self.ranks_per_node or self.gpus_per_node or 1


def seconds(time: str) -> int | None:
    """A SLURM time in seconds, None for no limit. Raises LaunchError for what is no such time.

    Forms: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, UNLIMITED.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise LaunchError(
            f"--time {time!r} is no time of SLURM: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS or UNLIMITED."
        )
    if match["days"]:
        hours, minutes, rest = _padded(match["of_day"].split(":"))
        total = int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + rest
    elif match["short"]:
        parts = match["short"].split(":")
        hours, minutes, rest = _padded(parts if len(parts) == 3 else ["0", *parts])
        total = hours * 3600 + minutes * 60 + rest
    else:
        return None
    if total == 0:
        raise LaunchError(f"--time {time} is no time at all.")
    return total


def _padded(parts: Sequence[str]) -> list[int]:
    return [int(part) for part in (*parts, "0", "0")][:3]


def slurm_script(
    job: SlurmJob, *, command: str, python: str, arguments: Sequence[str], points: Sequence[Point] = ()
) -> str:
    """The text for `sbatch`.

    command: how to print it again, for its second line. python: of the nodes, or of the container. arguments: those of
    `moemm train`, without --resume. points: the tasks of an array.
    """
    words = shlex.join(arguments) + (' "${point[@]}"' if points else "")
    values = {
        "command": " ".join(command.splitlines()),
        "name": re.sub(r"\s+", "-", job.name),
        "nodes": str(job.nodes),
        "ranks_per_node": str(job.local_ranks),
        "gpus_per_node": str(job.gpus_per_node) if job.gpus_per_node else None,
        "cpus_per_rank": str(job.cpus_per_rank) if job.cpus_per_rank else None,
        "time": job.time,
        "partition": job.partition or None,
        "account": job.account or None,
        "qos": job.qos or None,
        "array": f"0-{len(points) - 1}" if points else None,
        "sbatch": "\n#SBATCH ".join(f"--{option.removeprefix('--')}" for option in job.sbatch) or None,
        "log": log_name(array=bool(points)),
        "save_s": str(job.save_s),
        "requeue_option": "--requeue" if job.requeue else "--no-requeue",
        "requeue": "yes" if job.requeue else None,
        "sweep": "\n".join(f"{i}) point=({shlex.join(point.overrides)}) ;;" for i, point in enumerate(points)),
        "container": _container(job) or None,
        "python": shlex.quote(python),
        "arguments": words,
    }
    return fill((TEMPLATES / "job.sbatch").read_text(encoding="utf-8"), values)


def log_name(*, array: bool) -> str:
    """File that the job writes to, in the folder that it is submitted from; %x is its name."""
    return "%x-%A_%a.out" if array else "%x-%j.out"


def is_apptainer(container: str) -> bool:
    """Whether an image is started by Apptainer: FILE.sif, or an URL such as docker://...; all others by Pyxis."""
    return container.endswith(".sif") or "://" in container


def _container(job: SlurmJob) -> str:
    """What stands between `srun` and Python: Apptainer's command, or options of srun that the Pyxis plugin adds."""
    if not job.container:
        return ""
    image = shlex.quote(job.container)
    mounts = ['"$PWD"', *map(shlex.quote, job.mount)]
    if is_apptainer(job.container):
        bound = " ".join(f"--bind {mount}" for mount in mounts)
        return f'apptainer exec {"--nv " if job.gpus_per_node else ""}{bound} --pwd "$PWD" {image} \\'
    pairs = ",".join(f"{mount}:{mount}" for mount in mounts)
    return f'--container-image={image} --container-mounts={pairs} --container-workdir="$PWD" \\'


def submit(script: str) -> str:
    """Hand the script to `sbatch`; returns the job's id. Raises LaunchError with what sbatch says."""
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "There is no sbatch on PATH: this machine cannot submit to SLURM. Run this on a login node, or print the "
            "script with --dry-run and submit it there."
        )
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise LaunchError(f"sbatch refused the job: {said}\n  The script: the same command with --dry-run.")
    return done.stdout.strip().partition(";")[0]
