"""`moemm extend`, `moemm extend check` and `moemm extend remove`."""

from __future__ import annotations

import json as json_text
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from moemm.cli.output import show, show_json
from moemm.cli.subject import MorePlugins
from moemm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moemm.growth import Receipt
    from moemm.growth.extend import Plan

RunFolder = Annotated[Positional[Path], arg(name="run", metavar="RUN")]


@dataclass(kw_only=True)
class Extend:
    """Add a modality, a task or experts to a trained run, train what is new, and prove that the old parts did not move.

    With --data alone it finds what is new in the file, chooses layers and copies, trains, scores old and new tasks, and
    writes a run folder with receipt.json. Exit code 1 where a proof fails. `moemm extend check` compares a run that was
    trained further with its base again; `moemm extend remove` takes an extension away. Keys of `train` may
    follow: --train.steps 500.
    """

    run_folder: RunFolder
    """Folder of the trained run; it stays as it is."""
    data: Path | None = None
    """Data file with the new modality, or with a new task on known ones; without it the run gets experts alone."""
    modality: str | None = None
    """Name of the new modality; that of the file when not given."""
    task: str | None = None
    """Name of the new task; that of the file when not given."""
    label: str = "label"
    """Data set of the file that holds the target."""
    name: str | None = None
    """Name of the extension and of its experts; the modality's or task's when not given."""
    per_layer: int | None = None
    """New experts a layer; 1 when not given, 0 for none."""
    layers: str | None = None
    """Where they stand: all, numbers (0,2), or auto:0.5, that share of the layers whose routers shift most. auto:0.5
    when not given, or all where no router tells."""
    kind: Literal["modality", "routed"] | None = None
    """modality: runs on every token that may use it. routed: where the router sends. modality when not given, if the
    run has such experts."""
    width: int | None = None
    """Hidden units of each; as the old ones when not given."""
    init: str = "nearest"
    """What they are copies of: nearest (lowest loss of the new samples), most_used, random, or the id of an expert."""
    visible_to: str = ""
    """Modalities, or the new task, that may use them, with commas between; what is new when not given."""
    shared_norms: bool = False
    """The new modality uses the norms of the old ones, in place of its own."""
    unfreeze: bool = False
    """Train all parts; the receipt then says what old tasks have lost, and promises nothing."""
    replay: bool = False
    """With --unfreeze: train on the old tasks, too."""
    options: str = ""
    """Options of the new tokenizer as JSON: '{"patch": [8]}'."""
    samples: int = 256
    """Samples of each split to choose layers and copies by."""
    trial_steps: int = 40
    """Steps of each fit to choose by."""
    output: Path | None = None
    """Folder of the new run; RUN-NAME when not given."""
    plan: Path | None = None
    """Write the plan here as JSON, and stop; or, if the file exists, carry out the plan in it."""
    no_train: bool = False
    """Write the run and stop, to train it behind a launcher."""
    plugin: MorePlugins = ()
    json: bool = False
    """Print the receipt as JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Plan, write, train, compare and print; 0, or 1 where a proof fails."""
        _check_folder(self.run_folder)
        training = self._training(overrides)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                "moemm extend runs in one process; add --no-train there, and train the run that it writes behind the "
                "launcher: moemm train OUTPUT/config.yaml --resume"
            )
        from moemm.growth import extend
        from moemm.growth.grown import check_target

        if self.output is not None:
            check_target(self.output)  # before the minutes that choosing takes
        if self.plan is not None and not self.plan.exists():
            return self._write(self._plan(training), self.plan)
        plan = self._plan(training) if self.plan is None else extend.Plan.load(self.plan)
        receipt = extend.apply(plan, output=self.output, training=not self.no_train, plugins=self.plugin, tell=_tell)
        _show(receipt, json=self.json)
        if not self.json:
            config = Path(receipt.target) / "config.yaml"
            more = "to train" if self.no_train else "to train on"
            show(f"\n{more:<11} moemm train {config} --resume   then: moemm extend check {receipt.target}")
        return 0 if receipt.ok else 1

    def _plan(self, training: dict[str, Any]) -> Plan:
        from moemm.growth import extend

        experts = {key: getattr(self, key) for key in ("per_layer", "layers", "kind", "width")}
        names = tuple(name.strip() for name in self.visible_to.split(",") if name.strip())
        return extend.plan(
            self.run_folder, modality=self.modality, data=self.data, task=self.task, label=self.label,
            experts={key: value for key, value in experts.items() if value is not None}, init=self.init,
            visible_to=names or None, private=("tokenizer", "head", *(() if self.shared_norms else ("norm",))),
            unfreeze=self.unfreeze, replay=self.replay, name=self.name, options=self._options(), training=training,
            trying=extend.Trying(samples=self.samples, steps=self.trial_steps), plugins=self.plugin, tell=_tell,
        )  # fmt: skip

    def _write(self, plan: Plan, path: Path) -> int:
        try:
            plan.save(path)
        except OSError as error:
            raise ConfigError(f"--plan {path}: cannot be written: {error.strerror or error}") from error
        for line in plan.changed:
            show(f"- {line}")
        show(f"wrote {path}; to carry it out: moemm extend {self.run_folder} --plan {path}")
        return 0

    def _options(self) -> dict[str, Any]:
        try:
            values = json_text.loads(self.options or "{}")
        except ValueError as error:
            raise ConfigError(f"--options {self.options!r} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--options {self.options!r} must be a mapping, as '{{\"patch\": [8]}}'")
        return values

    def _training(self, overrides: Sequence[str]) -> dict[str, Any]:
        """Keys of `train` that were given behind."""
        from moemm.config import load_config

        for word in overrides:
            if word.startswith("--") and not word.startswith("--train."):
                raise ConfigError(
                    f"{word.partition('=')[0]}: moemm extend takes keys of `train` alone; all else is as in the run"
                )
        path = self.run_folder / "config.yaml"
        before, after = (vars(load_config(path, given).config.train) for given in ((), overrides))
        return {key: value for key, value in after.items() if value != before[key]}


@dataclass(kw_only=True)
class Check:
    """Compare an extended run, as it is now, with the run it was extended from; write and print its receipt."""

    run_folder: RunFolder
    """Folder of the extended run."""
    plugin: MorePlugins = ()
    json: bool = False
    """Print the receipt as JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Compare and print; 0, or 1 where a proof fails."""
        del overrides
        _check_folder(self.run_folder)
        from moemm.growth import extend

        receipt = extend.check(self.run_folder, plugins=self.plugin)
        _show(receipt, json=self.json)
        return 0 if receipt.ok else 1


@dataclass(kw_only=True)
class Remove:
    """Write a run without one of its extensions: all other weights as they were, to the bit."""

    run_folder: RunFolder
    """Folder of the extended run; it stays as it is."""
    name: str
    """Name of the extension."""
    output: Path
    """Folder of the new run."""
    plugin: MorePlugins = ()
    json: bool = False
    """Print the receipt as JSON instead of tables."""

    def run(self, overrides: Sequence[str]) -> int:
        """Write and print; 0, or 1 where the weights are not those of before."""
        del overrides
        _check_folder(self.run_folder)
        from moemm.growth import extend

        receipt = extend.remove(self.run_folder, self.name, output=self.output, plugins=self.plugin)
        _show(receipt, json=self.json)
        return 0 if receipt.ok else 1


def _check_folder(folder: Path) -> None:
    from moemm.config.suggest import missing_path

    if not folder.is_dir():
        raise CheckpointError(missing_path(folder, what="run folder"))


def _show(receipt: Receipt, *, json: bool) -> None:
    if json:
        show_json(receipt.to_dict())
        return
    from moemm.observe.receipt_table import render_receipt

    show(render_receipt(receipt.to_dict()))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
