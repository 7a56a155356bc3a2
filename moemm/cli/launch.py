"""`moemm launch`: slurm, local, torchrun, deepspeed."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from moemm.cli.subject import Plugins

if TYPE_CHECKING:
    from moemm.config import LoadedConfig
    from moemm.launch import Point, SlurmJob

Texts = Annotated[tuple[str, ...], UseAppendAction]
Config = Annotated[Path, arg(metavar="CONFIG")]


@dataclass(kw_only=True)
class Slurm:
    """Write a SLURM job that trains CONFIG, one rank a GPU, and submit it; --dry-run prints it instead.

    Before its time limit, or when it is preempted, the job saves and ends with code 85; with --requeue it is then
    queued again and goes on. Values of the configuration may follow: --train.steps 100. docs/launch.md says more.
    """

    config: Positional[Config]
    """YAML file, as it is found from the folder that the job is submitted from."""
    nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 8
    """GPUs of a node; 0: train on the CPU."""
    ranks_per_node: int = 0
    """Ranks on a node; 0: one a GPU, or 1."""
    cpus_per_rank: int = 0
    """Cores of a rank, with those of its loader workers; 0: SLURM's default, mostly 1."""
    time: str = "24:00:00"
    """Time limit: minutes, HH:MM:SS, D-HH:MM:SS, ..."""
    partition: str = ""
    """Partition; SLURM's default where it is left out, as for the next two."""
    account: str = ""
    """Account that is charged."""
    qos: str = ""
    """Quality of service."""
    sbatch: Texts = ()
    """Another option of sbatch without its dashes: --sbatch exclusive --sbatch mem=64G."""
    container: str = ""
    """Image to run in: FILE.sif or docker://... by Apptainer, all others by Pyxis (FILE.sqsh, nvcr.io#nvidia/...)."""
    mount: Texts = ()
    """A folder that the container needs beside the one that the job is submitted from."""
    python: str = ""
    """Python of the nodes; default: this one, in a container `python`."""
    requeue: bool = False
    """Queue the job again after a save, until training is done."""
    save_s: int = 120
    """Seconds before the time limit at which ranks are told to save."""
    array: Texts = ()
    """KEY=VALUE,VALUE: a job for each value; given again, for each combination. Runs: train.output-sweep/KEY_VALUE."""
    plugin: Plugins = ()
    """Python file that registers modalities, routers ... of your own; as for `moemm train`."""
    dry_run: bool = False
    """Print the script and submit nothing."""

    def run(self, overrides: Sequence[str]) -> int:
        """Check the configuration of every job, then print the script or submit it; 0."""
        from moemm.launch import slurm_script, submit

        loaded = _load(self.config, overrides, self.plugin)
        job = self._job(loaded)
        points = self._points(loaded, overrides, job.ranks)
        script = slurm_script(
            job,
            command=shlex.join(["moemm", "launch", "slurm", *self._words(), *overrides]),
            python=self.python or ("python" if self.container else sys.executable),
            arguments=_arguments(self.config, overrides, self.plugin),
            points=points,
        )
        if self.dry_run:
            print(script, end="")
        else:
            print(_submitted(submit(script), job, points, loaded.config.train.output))
        return 0

    def _job(self, loaded: LoadedConfig) -> SlurmJob:
        from moemm.launch import SlurmJob

        asked = {field.name: getattr(self, field.name) for field in fields(SlurmJob) if field.name != "name"}
        return SlurmJob(name=loaded.config.name, **asked)

    def _points(self, loaded: LoadedConfig, overrides: Sequence[str], ranks: int) -> list[Point]:
        from moemm.launch import sweep

        points = sweep(self.array, output=loaded.config.train.output)
        for point in points:
            _check_ranks(_load(self.config, [*overrides, *point.overrides], self.plugin), ranks)
        if not points:
            _check_ranks(loaded, ranks)
        return points

    def _words(self) -> list[str]:
        """The options as they were given, but for --dry-run."""
        words = [str(self.config)]
        for field in fields(self):
            value, option = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if field.name in ("config", "dry_run") or value == field.default:
                continue
            values = value if isinstance(value, tuple) else [value]
            words += [part for one in values for part in ([option] if one is True else [option, str(one)])]
        return words


@dataclass(kw_only=True)
class _Started:
    config: Positional[Config]
    """YAML file."""
    ranks: int = 0
    """Ranks on this machine; on GPUs, one a GPU."""
    port: int = 0
    """TCP port where the ranks meet; 0: a free one, or, with a hostfile, 29500."""
    resume: bool = False
    """Go on from the newest complete checkpoint of train.output."""
    plugin: Plugins = ()
    """Python file that registers modalities, routers ... of your own; as for `moemm train`."""
    dry_run: bool = False
    """Print the command and start nothing."""


@dataclass(kw_only=True)
class Local(_Started):
    """Train CONFIG on several ranks of this machine, without a launcher between: signals and exit codes are those of
    `moemm train`. Values of the configuration may follow: --train.steps 100.
    """

    def run(self, overrides: Sequence[str]) -> int:
        """Check the configuration, then become launchers/local.sh; 0 after --dry-run."""
        return _start(self, "local", overrides)


@dataclass(kw_only=True)
class Torchrun(_Started):
    """Train CONFIG on several ranks by torchrun: on this machine, or on the hosts of a hostfile, where the same command
    is run on each host. Values of the configuration may follow: --train.steps 100.
    """

    hostfile: Path | None = None
    """File with a line `HOST slots=RANKS` for each host, in place of --ranks; the ranks meet on the first."""
    node_rank: int = -1
    """This host's place in the hostfile, from 0; default: that of a name or address of this machine."""

    def run(self, overrides: Sequence[str]) -> int:
        """Check the configuration, then become launchers/multinode.sh; 0 after --dry-run."""
        return _start(self, "torchrun", overrides, hostfile=self.hostfile, node_rank=self.node_rank)


@dataclass(kw_only=True)
class Deepspeed(_Started):
    """Train CONFIG on several ranks by DeepSpeed's launcher: on this machine, or on the hosts of a hostfile, which it
    reaches by pdsh and ssh. Values of the configuration may follow: --train.steps 100.
    """

    hostfile: Path | None = None
    """File with a line `HOST slots=RANKS` for each host, in place of --ranks; the ranks meet on the first."""

    def run(self, overrides: Sequence[str]) -> int:
        """Check the configuration, then become launchers/multinode.sh; 0 after --dry-run."""
        return _start(self, "deepspeed", overrides, hostfile=self.hostfile)


def _start(
    verb: _Started,
    launcher: str,
    overrides: Sequence[str],
    *,
    hostfile: Path | None = None,
    node_rank: int = -1,
) -> int:
    from moemm.launch import plan_start, start

    loaded = _load(verb.config, overrides, verb.plugin)
    arguments = [*_arguments(verb.config, overrides, verb.plugin), *(["--resume"] if verb.resume else [])]
    planned = plan_start(
        launcher, arguments=arguments, ranks=verb.ranks, hostfile=hostfile, port=verb.port, node_rank=node_rank
    )
    _check_ranks(loaded, planned.ranks)
    if verb.dry_run:
        print(planned.text())
    else:
        start(planned)
    return 0


def _load(path: Path, overrides: Sequence[str], plugins: Sequence[Path]) -> LoadedConfig:
    from moemm.config import load_config
    from moemm.config.overrides import plugin_overrides

    return load_config(path, [*overrides, *plugin_overrides(plugins)])


def _check_ranks(loaded: LoadedConfig, ranks: int) -> None:
    from moemm.config import deepspeed_section

    deepspeed_section(loaded.config, world_size=ranks)


def _arguments(path: Path, overrides: Sequence[str], plugins: Sequence[Path]) -> list[str]:
    from moemm.config.overrides import plugin_overrides

    return [str(path), *overrides, *plugin_overrides(plugins)]


def _submitted(number: str, job: SlurmJob, points: Sequence[Point], output: str) -> str:
    """What was submitted, and the commands to watch and to end it."""
    from moemm.launch.slurm import log_name

    file = log_name(array=bool(points)).replace("%x", job.name).replace("%j", number).replace("%A", number)
    tasks = f", {len(points)} tasks" if points else ""
    folder = f"{output.rstrip('/')}-sweep/*" if points else output
    again = "queued again" if job.requeue else "its script can be submitted again"
    return "\n".join(
        [
            f"job {number}: {job.nodes} node(s) x {job.local_ranks} rank(s){tasks}",
            f"  watch  squeue --job {number}",
            f"         tail -F {file.replace('%a', '*')}",
            f"         tail -F {folder}/metrics.jsonl",
            f"  save and end  scancel --signal=USR1 {number}    # {again}",
            f"  end now       scancel {number}",
        ]
    )
