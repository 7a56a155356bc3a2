"""RUN|CONFIG: what verbs that look at a model are given, a run folder or a configuration file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from moemm.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from moemm.checkpoint import Manifest
    from moemm.config import LoadedConfig
    from moemm.models import Model


_OWN = "Python file that registers modalities, routers ... of your own; its code runs. May be given several times. "
Plugins = Annotated[
    tuple[Path, ...],
    UseAppendAction,
    arg(
        metavar="FILE",
        help=_OWN + "It takes the place of `plugins` of the configuration, or of the run's own copies.",
    ),
]
"""Type of the option --plugin of verbs that build a model; it brings its help text."""
MorePlugins = Annotated[
    tuple[Path, ...],
    UseAppendAction,
    arg(
        metavar="FILE",
        help=_OWN + "The run's own copies run too, but for one of the same name; what is written has a copy of each.",
    ),
]
"""The same for verbs that read runs which grow."""


def load(path: Path, overrides: Sequence[str], plugins: Sequence[Path] = ()) -> LoadedConfig:
    """The configuration of a run folder, or of a file with the command line's values over it; its plugins are loaded.

    Raises ConfigError: no such file, values for a run folder. CheckpointError: a folder that holds no run.
    """
    from moemm.config.suggest import missing_path

    if not path.exists():
        raise ConfigError(missing_path(path, what="run folder or configuration"))
    if not path.is_dir():
        return _load_file(path, overrides, plugins)
    if overrides:
        raise ConfigError(
            f"{path} is a run folder, whose model is what it is: {overrides[0]} cannot change it; give the "
            "configuration file instead"
        )
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"{path} is no run folder: it has no config.yaml. Give train.output of a run, or a YAML.")
    from moemm.plugins import load_stored

    return load_stored(path, "config.yaml", plugins)


def _load_file(path: Path, overrides: Sequence[str], plugins: Sequence[Path]) -> LoadedConfig:
    from moemm.config import load_config
    from moemm.config.overrides import plugin_overrides

    loaded = load_config(path, [*overrides, *plugin_overrides(plugins)])
    if loaded.config.plugins:
        from moemm.plugins import load_plugins

        load_plugins(loaded)
    return loaded


@dataclass(frozen=True, slots=True)
class Untrained:
    """A model with fresh weights, and the newest manifest of its run: None for a configuration, or before the first."""

    model: Model
    manifest: Manifest | None


def build(path: Path, overrides: Sequence[str], plugins: Sequence[Path] = ()) -> Untrained:
    """The model of a run folder, from what it stored and without its data, or that of a configuration.

    Raises as `load`, DataError for data that a configuration names, CheckpointError for a run folder with broken files.
    """
    from moemm.models import build_model
    from moemm.train.setup import learn_modalities, load_stored, stored_catalogue

    loaded = load(path, overrides, plugins)
    if path.is_dir():
        specs, stored = load_stored(path)
        tasks = stored_catalogue(stored).tasks
    else:
        catalogue, specs = learn_modalities(loaded)
        tasks = catalogue.tasks
    model = build_model(loaded.config.model, specs=specs, tasks=tasks)
    return Untrained(model, _newest(path / "checkpoints"))


def saved_as_is(found: Untrained) -> bool:
    """Whether the run's checkpoint, where there is one with an expert map, has that of the configuration."""
    saved = found.manifest.expert_map if found.manifest else None
    return saved is None or saved == json.loads(json.dumps(found.model.map.to_dict()))


def _newest(folder: Path) -> Manifest | None:
    """The newest manifest that can be read; the files that it names are not hashed: nothing of them is used."""
    from moemm.checkpoint import read_manifest

    for step in sorted((found for found in folder.glob("step_*") if not found.suffix), reverse=True):
        try:
            return read_manifest(step)
        except CheckpointError:
            continue
    return None
