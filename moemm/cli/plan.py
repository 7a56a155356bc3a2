"""`moemm plan`, `moemm plan placement` and `moemm plan simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction, arg

from moemm.cli.output import show, show_json
from moemm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moemm.config import LoadedConfig
    from moemm.plan.devices import Cluster
    from moemm.plan.shape import DataShape

Tokens = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="NAME=N")]


@dataclass(kw_only=True)
class Plan:
    """Say before a run what it needs: parameters, memory of each rank, time, network, GPU-hours; and which ZeRO stage,
    expert-parallel groups and micro-batch are the fastest that fit. Needs no GPU.

    Token counts come from the data files of the configuration, from what a run recorded, or from --data. docs/plan.md
    says how good the figures are. The configuration's own values are planned for, but for deepspeed.zero_stage and
    train.accumulation, which the plan chooses.
    """

    subject: Positional[Annotated[Path, arg(metavar="RUN|CONFIG")]]
    """Run folder or configuration."""
    gpus: Annotated[str, arg(metavar="NxKIND")] = "1xH100"
    """How many of which: 64xH100. Kinds: A100, H100, H200, B200, cpu."""
    data: Annotated[Path | None, arg(metavar="FILE")] = None
    """YAML that describes the data, for data that are not there."""
    tokens: Tokens = ()
    """Tokens of a sample of a modality, in place of the data's own: image=196. May be given several times."""
    zero: int | None = None
    """Only this ZeRO stage; all are tried when not given."""
    ep: int | None = None
    """Only this size of expert-parallel groups; all that divide the ranks are tried when not given."""
    micro_batch: int | None = None
    """Only this number of samples a rank and micro-batch."""
    efficiency: float | None = None
    """Share of the peak rate that training reaches, as measured on a device of the kind: 0.3 when not given."""
    measured: bool = False
    """The run folder's run was on devices of this kind: take the share of their peak that it reached."""
    memory: float | None = None
    """GiB of a device, in place of the kind's."""
    peak: float | None = None
    """Peak TFLOP/s of a device at the run's precision, in place of the kind's."""
    link: float | None = None
    """GB/s between the devices of a node, in place of the kind's."""
    network: float | None = None
    """GB/s of a device to other nodes, in place of the kind's."""
    watts: float | None = None
    """Power of a device, in place of the kind's."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print the plan; 0. Raises ConfigError where nothing fits."""
        from moemm.plan import flops, report
        from moemm.plan.parameters import build_shape
        from moemm.plan.search import Wanted, search
        from moemm.plan.workload import workload

        loaded, data = read_subject(self.subject, overrides, self.data, self.tokens)
        shape = build_shape(loaded.config, data)
        cluster = self._cluster(loaded.config.train.precision)
        work = workload(shape)
        if self.measured:
            cluster = self._reached(cluster, flops.training(shape, work) / work.total, loaded.config.train.precision)
        plans = search(shape, work, cluster, Wanted(self._stage(), self.ep, self.micro_batch))
        whence = "measured in the run" if self.measured else "given" if self.efficiency is not None else "assumed"
        question = report.Question(loaded.config.name, cluster, report.total_steps(shape), whence)
        values = report.to_dict(shape, work, plans, question)
        if self.json:
            show_json(values)
            return 0
        show(report.render(values))
        show(f"settings: {report.settings(values)}")
        return 0

    def _stage(self) -> int | None:
        if self.zero is not None and self.zero not in range(4):
            raise ConfigError(f"--zero {self.zero}: is no ZeRO stage\n  allowed: 0, 1, 2, 3")
        return self.zero

    def _reached(self, cluster: Cluster, operations: float, precision: str) -> Cluster:
        """The cluster with the share of the peak that the run's ranks reached. operations: of a token, in training."""
        from dataclasses import replace

        from moemm.plan.trace import read_rate

        if not self.subject.is_dir():
            raise ConfigError(f"--measured: {self.subject} is no run folder; a configuration has no rate yet")
        reached = read_rate(self.subject) * operations / cluster.device.flops(precision)
        return replace(cluster, device=replace(cluster.device, efficiency=min(reached, 1.0), launch=0.0))

    def _cluster(self, precision: str) -> Cluster:
        from dataclasses import replace

        from moemm.plan.devices import GIB, parse_cluster

        cluster = parse_cluster(self.gpus)
        units = {"memory": GIB, "peak": 1e12, "link": 1e9, "network": 1e9, "watts": 1.0, "efficiency": 1.0}
        given = {name: getattr(self, name) for name in units}
        for name, value in given.items():
            if value is not None and (value <= 0 or (name == "efficiency" and value > 1)):
                raise ConfigError(f"--{name} {value:g}: allowed: above 0{', to 1' if name == 'efficiency' else ''}")
        changed = {name: value * units[name] for name, value in given.items() if value is not None}
        if "peak" in changed:
            changed[precision] = changed.pop("peak")
        return replace(cluster, device=replace(cluster.device, **changed))


def read_subject(
    subject: Path, overrides: Sequence[str], data: Path | None, tokens: Sequence[str]
) -> tuple[LoadedConfig, DataShape]:
    """The configuration of a file or run folder, and the data that it stands on. Raises ConfigError, DataError."""
    from moemm.config import load_config
    from moemm.config.suggest import missing_path
    from moemm.plan import source

    if not subject.exists():
        raise ConfigError(missing_path(subject, what="run folder or configuration"))
    if subject.is_dir() and not (subject / "config.yaml").is_file():
        raise CheckpointError(
            f"{subject} is no run folder: it has no config.yaml. Give train.output of a run, or a YAML."
        )
    loaded = load_config(subject / "config.yaml" if subject.is_dir() else subject, overrides)
    if data is not None:
        found = source.from_description(loaded.config, data)
    elif subject.is_dir():
        found = source.from_run(loaded, subject)
    else:
        _check_files(loaded)
        found = source.from_data(loaded)
    return loaded, source.with_tokens(found, dict(map(_count, tokens)))


def _check_files(loaded: LoadedConfig) -> None:
    from moemm.plan.source import TEMPLATE

    missing = [task.file for task in loaded.config.data.tasks if not (loaded.data_root / task.file).exists()]
    if missing:
        tasks = ", ".join(task.name for task in loaded.config.data.tasks)
        raise ConfigError(
            f"{loaded.path}: the data are not there: {loaded.data_root / missing[0]}\n"
            f"  to do: describe them in a YAML file and give it as --data FILE; tasks: {tasks}. It looks like\n"
            f"{TEMPLATE}"
        )


def _count(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError:
        raise ConfigError(f"--tokens {text}: is not NAME=N, the tokens of a sample; such as image=196") from None


@dataclass(kw_only=True)
class Placement:
    """Say which rank of an expert-parallel group should hold which expert, from the loads that a run recorded.

    Experts that are busy in the same steps are spread. The gain is measured on the last third of the windows, which the
    placement has not seen, against experts that are dealt out in turn. Ranks hold equally many experts of each width.
    """

    run_folder: Positional[Annotated[Path, arg(metavar="RUN", name="")]]
    """Run folder, of a model with modality or routed experts."""
    ep: int = 8
    """Ranks of a group, deepspeed.ep_size."""
    late: float = 0.5
    """Share of the steps, the last ones, that are looked at: routing has settled there."""
    output: Annotated[Path | None, arg(metavar="FILE")] = None
    """YAML file to write the section deepspeed.placement to, for `base:`; printed when not given."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0."""
        del overrides
        from moemm.plan import placement
        from moemm.plan.parameters import build_shape
        from moemm.plan.trace import read_trace

        if not 0 < self.late <= 1:
            raise ConfigError(f"--late {self.late:g}: allowed: above 0, to 1")
        loaded, data = read_run(self.run_folder)
        shape = build_shape(loaded.config, data)
        found = placement.place(shape, read_trace(self.run_folder).late(self.late), self.ep)
        text = placement.as_yaml(shape, found, self.ep)
        if self.output is not None:
            write_text(self.output, text)
        values = placement.to_dict(found, self.ep)
        if self.json:
            show_json(values)
            return 0
        show(placement.render(values))
        show(text.rstrip("\n") if self.output is None else f"written: {self.output}")
        return 0


@dataclass(kw_only=True)
class Simulate:
    """Say what a step would take on more ranks, with the routing that a run recorded: how much is lost to ranks that
    have more tokens, to experts that have more rows, to ranks that are slower, and to the network.

    Each rank keeps the micro-batch, so the batch grows with the ranks. Keys of the configuration (--model.dim 1024) ask
    the same of another size of model with the run's routing; its experts must be the run's.
    """

    run_folder: Positional[Annotated[Path, arg(metavar="RUN", name="")]]
    """Run folder, of a model with routed experts."""
    gpus: Annotated[str, arg(metavar="NxKIND")] = "1024xH100"
    """Up to how many of which."""
    ep: int = 8
    """Ranks of an expert-parallel group; 1: every rank has all experts."""
    zero: int = 1
    """ZeRO stage."""
    micro_batch: int = 64
    """Samples of a rank and micro-batch."""
    jitter: float = 0.02
    """Deviation of a rank's speed from step to step, as a share; assumed, not measured."""
    efficiency: float | None = None
    """Share of the peak rate that training reaches: 0.3 when not given."""
    late: float = 0.5
    """Share of the steps, the last ones, that are looked at: the placement is fitted on the first two thirds of their
    windows, and steps are drawn from the last third."""
    tokens: Tokens = ()
    """Tokens of a sample of a modality, in place of the data's own: image=196. May be given several times."""
    plot: Annotated[Path | None, arg(metavar="PATH")] = None
    """Draw PATH.png and PATH.svg."""
    json: bool = False
    """Print JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print it; 0."""
        values = simulated(self, overrides)
        if self.plot is not None:
            from moemm.observe.plots import save_figure, scaling_figure

            save_figure(scaling_figure(values), self.plot)
        if self.json:
            show_json(values)
            return 0
        from moemm.plan.report import render_simulation

        show(render_simulation(values))
        return 0


def simulated(wanted: Simulate, overrides: Sequence[str]) -> dict[str, Any]:
    """What `Simulate` prints, as JSON types: points with experts dealt out in turn, and as placed."""
    from dataclasses import replace

    from moemm.plan import placement
    from moemm.plan.devices import parse_cluster
    from moemm.plan.parameters import build_shape
    from moemm.plan.simulate import Setting, Simulation, sweep
    from moemm.plan.trace import read_trace

    _check_simulate(wanted)
    loaded, data = read_subject(wanted.run_folder, overrides, None, wanted.tokens)
    shape, trace = build_shape(loaded.config, data), read_trace(wanted.run_folder).late(wanted.late)
    cluster = parse_cluster(wanted.gpus)
    if wanted.efficiency is not None:
        cluster = replace(cluster, device=replace(cluster.device, efficiency=wanted.efficiency))
    held_out = placement.split(trace)[1]
    simulation = Simulation(shape, held_out, cluster)
    setting = Setting(wanted.zero, wanted.ep, wanted.micro_batch, wanted.jitter)
    ways = {"in turn": setting}
    if wanted.ep > 1:
        placed = placement.positions_of(placement.place(shape, trace, wanted.ep))
        ways["placed"] = replace(setting, positions=placed)
    points = {name: [one.to_dict() for one in sweep(simulation, cluster.count, way)] for name, way in ways.items()}
    return {
        "run": str(wanted.run_folder), "gpus": cluster.text, "ep_size": wanted.ep, "zero_stage": wanted.zero,
        "micro_batch": wanted.micro_batch, "jitter": wanted.jitter, "efficiency": cluster.device.efficiency,
        "windows": len(held_out), "points": points,
    }  # fmt: skip


def _check_simulate(wanted: Simulate) -> None:
    if wanted.zero not in range(4):
        raise ConfigError(f"--zero {wanted.zero}: is no ZeRO stage\n  allowed: 0, 1, 2, 3")
    for name, value in (("ep", wanted.ep), ("micro-batch", wanted.micro_batch)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: allowed: 1 and more")
    if wanted.jitter < 0:
        raise ConfigError(f"--jitter {wanted.jitter:g}: allowed: 0 and more")
    if not 0 < wanted.late <= 1:
        raise ConfigError(f"--late {wanted.late:g}: allowed: above 0, to 1")


def read_run(folder: Path) -> tuple[LoadedConfig, DataShape]:
    """As read_subject, for a run folder only."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is no run folder: loads are measured in training; give train.output of a run")
    return read_subject(folder, (), None, ())


def write_text(path: Path, text: str) -> None:
    """Write a file. Raises ConfigError where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror or error}") from error
