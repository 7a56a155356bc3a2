"""`moemm analyze heterogeneity`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.errors import ConfigError

if TYPE_CHECKING:
    from moemm.analyze import Merge, Transfer
    from moemm.config import Config, LoadedConfig
    from moemm.data.catalogue import Catalogue
    from moemm.modalities import ModalitySpec

FOLDER, FILE = "heterogeneity", "grouped.yaml"


@dataclass(kw_only=True)
class Heterogeneity:
    """Measure which modalities are alike, group them, and write a configuration in which a group shares its experts.

    Prints bits from each modality (row) to each (column), the order in which they are joined, and the groups. Writes
    grouped.yaml, ready for `moemm train`, and beside it the matrices as CSV.
    """

    subject: Annotated[Positional[Path], arg(name="subject", metavar="RUN|CONFIG")]
    """Folder of a trained run, or YAML file; values of a file's keys may follow: --model.dim 128."""
    measure: Literal["auto", "pvi", "zero-shot"] = "auto"
    """pvi: train a trunk on each modality and fit each other one through it (minutes). zero-shot: of a run, send each
    modality through the experts of each other one (a minute). auto: zero-shot for a run, pvi for a configuration."""
    groups: int = 0
    """Number of groups; 0 takes as many as --budget allows, or without it the number before the most costly merge."""
    budget: int = 0
    """Parameters that the whole grouped model may have at most; 0 for no limit."""
    pairs: bool = False
    """Measure also from each pair of modalities of a task to each other pair (pvi)."""
    samples: int = 512
    """Samples of each task and split to measure on, at most."""
    output: Path | None = None
    """File to write; heterogeneity/grouped.yaml in the run's folder when not given."""
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Measure, print and write; 0."""
        self._check()
        from moemm.cli.subject import load

        loaded = load(self.subject, overrides)
        values = self._measure(loaded)
        if self.json:
            show_json(values)
            return 0
        from moemm.observe.heterogeneity_table import render_heterogeneity

        show(render_heterogeneity(values))
        return 0

    def _check(self) -> None:
        if self.groups and self.budget:
            raise ConfigError("--groups and --budget both decide how many groups there are; give one of them")
        for name in ("groups", "budget"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name} {getattr(self, name)}: must be at least 1, or 0 to leave it open")
        if self.samples < 2:
            raise ConfigError(f"--samples {self.samples}: must be at least 2; a few hundred are enough")
        if self.measure == "zero-shot" and not self.subject.is_dir():
            raise ConfigError(
                f"--measure zero-shot needs the trained experts of a run, {self.subject} is none; give a run folder, "
                "or --measure pvi"
            )

    def _measure(self, loaded: LoadedConfig) -> dict[str, Any]:
        """Everything that is printed, as JSON types; writes the files."""
        from moemm import analyze
        from moemm.train.setup import learn_modalities

        measure = self.measure if self.measure != "auto" else "zero-shot" if self.subject.is_dir() else "pvi"
        if self.pairs and measure != "pvi":
            raise ConfigError("--pairs is measured by training; add --measure pvi")
        by_task: dict[str, Any] | None = None
        pairs = None
        if measure == "zero-shot":
            from moemm.train import load_run

            run = load_run(self.subject)
            catalogue, specs = run.catalogue, run.specs
            self._number(loaded.config, catalogue, specs)  # a budget that is too small is said before the measuring
            matrix, by_task = analyze.exchange_experts(run, samples=self.samples, tell=_tell)
        else:
            catalogue, specs = learn_modalities(loaded)
            self._number(loaded.config, catalogue, specs)
            effort = analyze.Effort(samples=self.samples)
            units = [(info.name,) for info in catalogue.modalities]
            matrix = analyze.transfer_between(loaded.config, catalogue, specs, units, effort=effort, tell=_tell)
            both = analyze.pairs_of(catalogue) if self.pairs else []
            if len(both) > 1:
                pairs = analyze.transfer_between(loaded.config, catalogue, specs, both, effort=effort, tell=_tell)
        merges = analyze.agglomerate(matrix.names, matrix.distance())
        number = self._number(loaded.config, catalogue, specs) or analyze.largest_jump(merges)
        groups = analyze.cut(matrix.names, merges, number)
        grouped = analyze.regroup(loaded.config, groups, [task.name for task in catalogue.tasks])
        path = self._write(loaded, grouped, [matrix, *([pairs] if pairs else [])])
        return {
            "subject": str(self.subject),
            "measure": measure,
            "samples": self.samples,
            "seed": loaded.config.train.seed,
            "matrix": _matrix(matrix),
            "pairs": _matrix(pairs) if pairs else None,
            "by_task": by_task,
            "merges": [_merge(merge) for merge in merges],
            "groups": [list(group) for group in groups],
            "parameters": {
                "before": analyze.parameters(loaded.config, specs, catalogue.tasks),
                "after": analyze.parameters(grouped, specs, catalogue.tasks),
            },
            "written": str(path),
        }

    def _number(self, config: Config, catalogue: Catalogue, specs: dict[str, ModalitySpec]) -> int:
        """The number of groups that the options ask for; 0 where they leave it open. Raises ConfigError."""
        from moemm import analyze

        names, tasks = list(specs), [task.name for task in catalogue.tasks]
        if self.groups > len(names):
            raise ConfigError(f"--groups {self.groups}: there are only {len(names)} modalities: {', '.join(names)}")
        analyze.regroup(config, [names], tasks)  # refuses a model without modality experts
        if self.budget:
            return analyze.largest_number(config, specs, catalogue.tasks, budget=self.budget)
        return self.groups

    def _write(self, loaded: LoadedConfig, grouped: Config, matrices: Sequence[Transfer]) -> Path:
        """grouped.yaml with an output folder of its own, and the matrices; returns its path."""
        from moemm.config import save_config

        run = self.subject if self.subject.is_dir() else Path(loaded.config.train.output)
        path = self.output or run / FOLDER / FILE
        train = replace(grouped.train, output=f"{loaded.config.train.output.rstrip('/')}-grouped")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_config(replace(loaded, config=replace(grouped, train=train)), path)
            for matrix, name in zip(matrices, ("modalities", "pairs"), strict=False):
                matrix.write_csv(path.with_name(f"{path.stem}.{matrix.measure}.{name}.csv"))
        except OSError as error:
            raise ConfigError(f"--output: cannot write {path}: {error.strerror or error}") from error
        return path


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _matrix(matrix: Transfer) -> dict[str, Any]:
    return {"names": list(matrix.names), "bits": matrix.bits_ST.tolist()}


def _merge(merge: Merge) -> dict[str, Any]:
    return {"left": list(merge.left), "right": list(merge.right), "height": merge.height}
