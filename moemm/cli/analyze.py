"""`moemm analyze heterogeneity` and `moemm analyze conflict`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import Plugins
from moemm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moemm.analyze import Pick, Subject
    from moemm.config import LoadedConfig
    from moemm.train import Run


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
    """Number of groups; 0 takes as many as --budget allows, or without it those before the largest jump of distance."""
    budget: int = 0
    """Parameters that the whole grouped model may have at most; 0 for no limit."""
    pairs: bool = False
    """Measure also from each pair of modalities of a task to each other pair (pvi)."""
    samples: int = 256
    """Samples of each task and split to measure on, at most."""
    output: Path | None = None
    """File to write; heterogeneity/grouped.yaml in the run's folder when not given."""
    plugin: Plugins = ()
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Measure, print and write; 0."""
        self._check()
        from moemm.cli.subject import load

        loaded = load(self.subject, overrides, self.plugin)
        from moemm import analyze

        wanted = analyze.Wanted(groups=self.groups, budget=self.budget, pairs=self.pairs, samples=self.samples)
        values, grouped, matrices = analyze.analyze_heterogeneity(self._subject(loaded), wanted, tell=_tell)
        run = self.subject if self.subject.is_dir() else Path(loaded.config.train.output)
        path = self.output or run / analyze.FOLDER / analyze.FILE
        analyze.write_grouped(loaded, grouped, matrices, path)
        values = {"subject": str(self.subject), **values, "written": str(path)}
        if self.json:
            show_json(values)
            return 0
        from moemm.observe.heterogeneity_table import render_heterogeneity

        show(render_heterogeneity(values))
        show(f"to train    moemm train {path}")  # as text: a command to copy must not be folded
        return 0

    @property
    def _zero_shot(self) -> bool:
        return self.measure == "zero-shot" or (self.measure == "auto" and self.subject.is_dir())

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
        if self.pairs and self._zero_shot:
            raise ConfigError("--pairs is measured by training; add --measure pvi")

    def _subject(self, loaded: LoadedConfig) -> Subject:
        from moemm.analyze import Subject

        if self._zero_shot:
            from moemm.train import load_run

            run = load_run(self.subject, plugins=self.plugin)
            return Subject(loaded, run.catalogue, run.specs, run)
        from moemm.train.setup import learn_modalities

        return Subject(loaded, *learn_modalities(loaded))


@dataclass(kw_only=True)
class Conflict:
    """Measure where the losses of a run pull its parameters apart, and write a configuration that splits experts there.

    Prints the mean cosine of each two losses' gradients by layer and part, at every checkpoint that the run keeps.
    Writes conflict/conflict.json, which `moemm report` shows, and scalars for TensorBoard; where experts of their own
    would help against a conflict that lasts, also split.yaml, ready for `moemm train`.
    """

    run_folder: Annotated[Positional[Path], arg(name="run", metavar="RUN")]
    """Folder of the run: train.output of its configuration."""
    batches: int = 32
    """Training batches to take gradients of, the same at each checkpoint."""
    samples: int = 64
    """Samples of a batch. Small ones are noisy, which brings cosines nearer to 0."""
    least: float = 0.0
    """How far under 0 a mean cosine must be to count as a conflict; sure it must be in any case."""
    output: Path | None = None
    """Configuration to write; conflict/split.yaml in the run's folder when not given."""
    plugin: Plugins = ()
    json: bool = False
    """Print JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Measure, print and write; 0."""
        del overrides
        self._check()
        from moemm import analyze
        from moemm.cli.subject import load

        loaded = load(self.run_folder, (), self.plugin)
        from moemm.observe.conflict_file import SPLIT, write_conflict

        run, pick = self._run()
        sampling = analyze.Sampling(batches=self.batches, samples=self.samples)
        values = analyze.analyze_conflict(run, pick, sampling, tell=_tell)
        decision, split = analyze.decide(run, values, least=self.least)
        values |= decision
        file = write_conflict(self.run_folder, values)  # first: it took minutes, and --output may fail
        path = None
        if split is not None:
            path = self.output or file.parent / SPLIT
            analyze.write_split(loaded, split, path)
        self._show({**values, "written": None if path is None else str(path)}, file)
        return 0

    def _check(self) -> None:
        from moemm.config.suggest import missing_path

        if not self.run_folder.is_dir():
            raise CheckpointError(missing_path(self.run_folder, what="run folder"))
        if self.batches < 2:
            raise ConfigError(
                f"--batches {self.batches}: must be at least 2, to tell how much cosines vary; 32 are good"
            )
        if self.samples < 1:
            raise ConfigError(f"--samples {self.samples}: must be at least 1; the run's batch size is a good choice")
        if not 0.0 <= self.least < 1.0:
            raise ConfigError(f"--least {self.least}: must be from 0 to less than 1, as a distance under 0")

    def _run(self) -> tuple[Run, Pick]:
        import torch

        from moemm.train import load_run
        from moemm.train.labels import Labels

        run = load_run(self.run_folder, plugins=self.plugin)
        return run, Labels(run.catalogue, run.config, torch.device("cpu")).pick

    def _show(self, values: Mapping[str, Any], file: Path) -> None:
        if self.json:
            show_json(values)
            return
        from moemm.observe.conflict_table import render_conflict

        show(render_conflict(values))
        show(f"\nwrote       {file}, and tensorboard/conflict")
        show(f"to draw     moemm report {self.run_folder}")
        if values["written"]:
            show(f"to train    moemm train {values['written']}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
