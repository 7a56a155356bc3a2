"""From a configuration to everything that stands before the first step: data, specs, model, run folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from moemm import plugins
from moemm.checkpoint.resume import changed_keys, nothing_completed
from moemm.config import Config, LoadedConfig, load_config, save_config
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.loader import drawn_sizes
from moemm.data.quarantine import flaw
from moemm.data.sample import Value
from moemm.distributed import broadcast_object, gather_objects, on_main
from moemm.errors import CheckpointError, ConfigError, DataError, MoemmError
from moemm.modalities import ModalitySpec, fit_modalities, specs_from_dict, specs_to_dict
from moemm.models import Model, build_model
from moemm.objectives import build_pretext
from moemm.train.harmonizing import build_fork, build_scale, build_settler
from moemm.train.init import reuse_specs
from moemm.train.quarantine import SHARE

CONFIG, MODALITIES, CATALOGUE, SUMMARY = "config.yaml", "modalities.json", "catalogue.json", "summary.json"
CHECKPOINTS = "checkpoints"
_STALE = (SUMMARY, "metrics.jsonl", "quarantine.jsonl")


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run is made of. folder: of the run; total_steps: optimizer steps that it will have had at its end."""

    config: Config
    catalogue: Catalogue
    specs: dict[str, ModalitySpec]
    folder: Path
    total_steps: int

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / CHECKPOINTS


def prepare(loaded: LoadedConfig, *, resume: bool) -> tuple[Setup, bool]:
    """Read the data, learn or load the modalities' specs, and make the run folder; all ranks together.

    Returns the setup, and whether there is a checkpoint to resume from.
    Raises ConfigError if the folder holds a run that would be lost, CheckpointError if the data changed since then.
    """
    config = loaded.config
    folder = Path(config.train.output)
    found = _load_plugins(loaded)
    going_on = on_main(lambda: _claim(folder, resume=resume))
    if going_on:
        on_main(lambda: _check_plugins(folder, found))
    catalogue = build_catalogue(config.data, base=loaded.path.parent)
    if going_on:
        specs, stored = on_main(lambda: load_stored(folder))
        check_catalogue(stored, catalogue)
    else:
        specs = broadcast_object(_fit(config, catalogue))
        on_main(lambda: store_run(loaded, folder, catalogue, specs))
    return Setup(config, catalogue, specs, folder, total_steps(config, catalogue)), going_on


def _load_plugins(loaded: LoadedConfig) -> list[plugins.Plugin]:
    """Run the files of `plugins` on every rank. Raises ConfigError on all of them where one cannot, or has others."""
    found: list[plugins.Plugin] = []
    problem: MoemmError | None = None
    try:
        found = plugins.load_plugins(loaded)
    except MoemmError as error:
        problem = error
    ranks = gather_objects(([plugin.sha256 for plugin in found], problem))
    for _, theirs in ranks:
        if theirs is not None:
            raise theirs
    for rank, (theirs_sha, _) in enumerate(ranks):
        if theirs_sha != ranks[0][0]:
            raise ConfigError(
                f"plugins: rank {rank} read other code than rank 0 from {', '.join(loaded.config.plugins)}\n"
                "  to do: put the same files on every machine"
            )
    return found


def _check_plugins(folder: Path, found: list[plugins.Plugin]) -> None:
    if (folder / CONFIG).is_file():
        plugins.check_unchanged(load_config(folder / CONFIG).config.plugins, found, folder=folder)


def total_steps(config: Config, catalogue: Catalogue) -> int:
    """`train.steps`, or the steps that `train.epochs` passes over the mixture take."""
    if config.train.steps is not None:
        return config.train.steps
    samples = sum(drawn_sizes(config, catalogue))
    return max(1, math.ceil((config.train.epochs or 1.0) * samples / config.train.batch_size))


def seeded_model(setup: Setup, device: torch.device) -> Model:
    """A model on `device` whose weights depend on `train.seed` alone: equal on all ranks."""
    torch.manual_seed(setup.config.train.seed)
    model = build_model(setup.config.model, specs=setup.specs, tasks=setup.catalogue.tasks)
    tokenizers: dict[str, Any] = dict(model.tokenizers.items())
    model.pretext = build_pretext(
        setup.config.objectives, tokenizers, model.tasks, setup.config.model.dim, seed=setup.config.train.seed
    )
    model.fork = build_fork(setup.config, model)
    model.settler = build_settler(setup.config, model)
    model.scale = build_scale(setup.config, model)
    model.trunk.recompute = setup.config.train.activation_checkpointing
    return model.to(device)


def _claim(folder: Path, *, resume: bool) -> bool:
    """Whether there is a checkpoint to go on from; refuses to write over a run unless told to go on with it."""
    if resume:
        return nothing_completed(folder / CHECKPOINTS) is None
    saved = any((folder / CHECKPOINTS).glob("step_*"))
    if saved or (folder / SUMMARY).exists():
        what = "a finished run" if (folder / SUMMARY).exists() else "a run with checkpoints"
        raise ConfigError(
            f"train.output: {folder} already holds {what}.\n  To go on with it: add --resume\n"
            f"  To train anew: choose another folder (--train.output NAME), or delete {folder}"
        )
    return False


def learn_modalities(loaded: LoadedConfig) -> tuple[Catalogue, dict[str, ModalitySpec]]:
    """The catalogue of a configuration's data, and the specs that a run on it begins with. Writes nothing.

    Raises ConfigError and DataError as a run would.
    """
    plugins.load_plugins(loaded)
    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    return catalogue, _fit(loaded.config, catalogue)


def _fit(config: Config, catalogue: Catalogue) -> dict[str, ModalitySpec]:
    # Every rank learns them from the data rather than wait for rank 0: that may outlast a collective's timeout.
    specs = fit_modalities(catalogue.modalities, config.modalities, lambda name: train_values(catalogue, name))
    if config.train.init is not None:
        specs = reuse_specs(specs, config)
    return specs_from_dict(json.loads(json.dumps(specs_to_dict(specs))))  # as a resume will read them


def train_values(catalogue: Catalogue, modality: str) -> Iterator[Value]:
    """Every sound value of a modality in the train splits; a file that several tasks share counts once."""
    seen = set()
    for task in catalogue.tasks:
        if modality not in task.modalities or (task.file, modality) in seen:
            continue
        seen.add((task.file, modality))
        dataset = SplitDataset(catalogue, task=task.name, split="train")
        stored = (task.stored or task.modalities)[task.modalities.index(modality)]
        yield from _sound_values(dataset, stored)


def _sound_values(dataset: SplitDataset, stored: str) -> Iterator[Value]:
    """Without those of broken samples, which training puts aside. DataError: they are more than it would bear."""
    broken = 0
    for index in dataset.indices.tolist():  # not sample by sample: targets and other modalities cost time
        value: Value | None = None
        try:
            value = dataset.file.read(stored, index)
        except DataError:
            broken += 1
            if broken > max(1, SHARE * len(dataset)):
                raise
        if value is not None and flaw(value) is None:
            yield value


def store_run(loaded: LoadedConfig, folder: Path, catalogue: Catalogue, specs: Mapping[str, ModalitySpec]) -> None:
    """Make the run folder, and write into it what a run is before its first step. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _STALE:
            (folder / name).unlink(missing_ok=True)
        for events in (folder / "tensorboard").glob("events.*"):
            events.unlink()
        copies = [os.path.relpath(folder / name, loaded.path.parent) for name in plugins.copy_plugins(loaded, folder)]
        save_config(replace(loaded, config=replace(loaded.config, plugins=copies)), folder / CONFIG)
        _write_json(folder / MODALITIES, specs_to_dict(specs))
        _write_json(folder / CATALOGUE, describe(catalogue))
    except OSError as error:
        raise ConfigError(f"train.output: cannot write the run folder {folder}: {error.strerror or error}") from error


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def load_stored(folder: Path) -> tuple[dict[str, ModalitySpec], dict[str, Any]]:
    """Specs, and the description of the catalogue, that a run folder holds. Raises CheckpointError."""
    try:
        specs = specs_from_dict(json.loads((folder / MODALITIES).read_text(encoding="utf-8")))
        catalogue = json.loads((folder / CATALOGUE).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: {MODALITIES} or {CATALOGUE} of the run cannot be read ({error}); put it back from a copy, "
            "or train anew in another folder"
        ) from error
    return specs, catalogue


def describe(catalogue: Catalogue) -> dict[str, Any]:
    """The catalogue as JSON types, without the places of its files."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(catalogue)))
    for task in values["tasks"]:
        task["file"] = Path(task["file"]).name
        if task["drawn_with"] is None:  # as runs wrote it before there were joint labels
            del task["drawn_with"]
        if task["bags"] is None:  # the same, before there were bags
            del task["bags"], task["together"]
    return values


def stored_catalogue(stored: Mapping[str, Any]) -> Catalogue:
    """The inverse of `describe`, but for the places of the files. Raises CheckpointError."""
    try:
        return TypeAdapter(Catalogue).validate_python(stored)
    except ValidationError as error:
        raise CheckpointError(f"{CATALOGUE} of the run does not describe tasks and modalities: {error}") from error


def check_catalogue(stored: Mapping[str, Any], catalogue: Catalogue) -> None:
    """Refuse data that is not that of the run. Raises CheckpointError that names what changed."""
    _check_names(stored, catalogue)
    _check_joint(stored, catalogue)
    changed = list(changed_keys(stored, describe(catalogue)).values())
    if changed:
        shown = "".join(f"\n  {line}" for line in changed[:8])
        raise CheckpointError(f"The data is not what the run began with:{shown}\nPut the old files back or train anew.")


def _check_joint(stored: Mapping[str, Any], catalogue: Catalogue) -> None:
    before = any(entry.get("drawn_with") for entry in stored["tasks"])
    now = any(task.drawn_with for task in catalogue.tasks)
    if before != now:
        was, is_ = (str(value).lower() for value in (before, now))
        raise CheckpointError(
            f"data.joint_labels: was {was} when the run began, is {is_}: samples would come in another order. Give "
            f"--data.joint-labels {was}, or train anew in another folder (--train.output NAME)."
        )


def _check_names(stored: Mapping[str, Any], catalogue: Catalogue) -> None:
    for part in ("modalities", "tasks"):
        before = [entry["name"] for entry in stored[part]]
        now = [entry.name for entry in getattr(catalogue, part)]
        if before != now:
            raise CheckpointError(
                f"The run has {len(before)} {part} ({', '.join(before)}), the configuration has {len(now)} "
                f"({', '.join(now)}). Give the old ones, or train anew in another folder (--train.output NAME)."
            )
