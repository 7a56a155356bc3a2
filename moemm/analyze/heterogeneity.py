"""From a configuration or a run to groups: measure, join, cut, and write a configuration that shares experts so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moemm.analyze.cluster import agglomerate, cut, largest_jump
from moemm.analyze.grouping import largest_number, parameters, regroup
from moemm.analyze.matrix import Transfer
from moemm.analyze.pvi import Effort, pairs_of, transfer_between
from moemm.analyze.zero_shot import exchange_experts
from moemm.config import Config, LoadedConfig, save_config
from moemm.data.catalogue import Catalogue
from moemm.errors import ConfigError
from moemm.evaluate import TrainedRun
from moemm.modalities import ModalitySpec

FOLDER, FILE = "heterogeneity", "grouped.yaml"
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How many groups: `groups`, or as many as `budget` parameters of the whole model allow; 0 leaves it open.

    pairs: measure pairs of modalities too. samples: of each task and split, at most.
    """

    groups: int = 0
    budget: int = 0
    pairs: bool = False
    samples: int = 256


@dataclass(frozen=True, slots=True)
class Subject:
    """What is analysed: a configuration, its data, and the trained run for the zero-shot measure (None: PVI)."""

    loaded: LoadedConfig
    catalogue: Catalogue
    specs: Mapping[str, ModalitySpec]
    run: TrainedRun | None = None

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return [task.name for task in self.catalogue.tasks]


def analyze_heterogeneity(
    subject: Subject, wanted: Wanted, *, tell: Tell = lambda line: None
) -> tuple[dict[str, Any], Config, list[Transfer]]:
    """The result as JSON types, the grouped configuration, and the matrices: of modalities and, if wanted, of pairs.

    {"measure", "samples", "seed", "matrix": {"names", "bits"}, "pairs" likewise or None, "by_task" of zero-shot,
    "merges": [{"left", "right", "height"}], "groups", "parameters": {"before", "after"}}. tell: gets lines of progress.
    Raises ConfigError, before it measures, where `wanted` cannot be had; DataError for modalities without samples.
    """
    config, names = subject.loaded.config, list(subject.specs)
    number = _number(subject, wanted)
    matrices, by_task = _measure(subject, wanted, tell)
    merges = agglomerate(names, matrices[0].distance())
    groups = cut(names, merges, number or largest_jump(merges))
    grouped = regroup(config, groups, subject.tasks)
    sizes = [parameters(one, subject.specs, subject.catalogue.tasks) for one in (config, grouped)]
    values = {
        "measure": matrices[0].measure,
        "samples": wanted.samples,
        "seed": config.train.seed,
        "matrix": _plain(matrices[0]),
        "pairs": _plain(matrices[1]) if len(matrices) > 1 else None,
        "by_task": by_task,
        "merges": [asdict(merge) for merge in merges],
        "groups": [list(group) for group in groups],
        "parameters": dict(zip(("before", "after"), sizes, strict=True)),
    }
    return values, grouped, matrices


def write_grouped(loaded: LoadedConfig, grouped: Config, matrices: list[Transfer], path: Path) -> None:
    """The grouped configuration, complete and with an output folder of its own, and the matrices as CSV beside it.

    Raises ConfigError where they cannot be written.
    """
    train = replace(grouped.train, output=f"{grouped.train.output.rstrip('/')}-grouped")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_config(replace(loaded, config=replace(grouped, train=train)), path)
        for matrix, name in zip(matrices, ("modalities", "pairs"), strict=False):
            matrix.write_csv(path.with_name(f"{path.stem}.{matrix.measure}.{name}.csv"))
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror or error}") from error


def _number(subject: Subject, wanted: Wanted) -> int:
    """The number of groups that is asked for; 0 where that is left open."""
    names = list(subject.specs)
    if wanted.groups > len(names):
        raise ConfigError(f"--groups {wanted.groups}: there are only {len(names)} modalities: {', '.join(names)}")
    regroup(subject.loaded.config, [names], subject.tasks)  # refuses a model without modality experts
    if wanted.budget:
        return largest_number(subject.loaded.config, subject.specs, subject.catalogue.tasks, budget=wanted.budget)
    return wanted.groups


def _measure(subject: Subject, wanted: Wanted, tell: Tell) -> tuple[list[Transfer], dict[str, Any] | None]:
    if subject.run is not None:
        matrix, by_task = exchange_experts(subject.run, samples=wanted.samples, tell=tell)
        return [matrix], by_task
    units: list[list[tuple[str, ...]]] = [[(name,) for name in subject.specs]]
    pairs = pairs_of(subject.catalogue) if wanted.pairs else []
    if len(pairs) > 1:  # one alone has nothing to be compared with
        units.append([*pairs])
    effort = Effort(samples=wanted.samples)
    config, data = subject.loaded.config, (subject.catalogue, subject.specs)
    return [transfer_between(config, *data, one, effort=effort, tell=tell) for one in units], None


def _plain(matrix: Transfer) -> dict[str, Any]:
    return {"names": list(matrix.names), "bits": matrix.bits_ST.tolist()}
