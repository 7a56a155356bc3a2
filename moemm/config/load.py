"""A YAML file, the files that it builds on, and overrides -> one checked `Config`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moemm.config.check import check
from moemm.config.overrides import apply_overrides, forget_origins
from moemm.config.problem import NOT_GIVEN, KeyPath, Origin, Problem, Source, config_error, dotted, value_at
from moemm.config.schema import Config
from moemm.config.validate import validate
from moemm.config.yaml_source import read_yaml
from moemm.errors import ConfigError

MAX_BASES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedConfig:
    """A configuration, and how it came about.

    path: the file that was named; a relative `data.root`, and relative `plugins`, start at its folder.
    source: the values that were given, as plain dicts and lists, all layers merged; no defaults.
    origins: path of keys -> where the value came from (`recipe.yaml:14`, `command line --model.dim`).
    """

    config: Config
    path: Path
    source: dict[str, Any]
    origins: dict[KeyPath, str]

    @property
    def data_root(self) -> Path:
        """Folder that the tasks' relative files start at."""
        return self.path.parent / self.config.data.root

    @property
    def plugin_files(self) -> list[Path]:
        """The files of `plugins`."""
        return [Path(os.path.normpath(self.path.parent / name)) for name in self.config.plugins]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read, merge and check. `overrides` as on the command line, ["--model.dim", "128"], or ["model.dim=128"].

    Raises ConfigError that lists all problems at once.
    """
    path = Path(path)
    source = read_layers(path)
    apply_overrides(source, overrides, layer=1 + max(origin.layer for origin in source.origins.values()))
    _last_duration_wins(source)
    config = _checked(source, name=str(path))
    origins = {key: origin.text for key, origin in source.origins.items()}
    return LoadedConfig(config=config, path=path, source=source.values, origins=origins)


def from_dict(values: Mapping[str, Any], *, origin: str) -> Config:
    """A checked configuration from plain values (of a checkpoint, say); `origin` names where they are from."""
    source = Source(values=copy.deepcopy(dict(values)), origins={(): Origin(text=origin)})
    return _checked(source, name=origin)


def read_layers(path: Path) -> Source:
    """The file merged over the files that its key `base` names (one, or a list: later ones win)."""
    source = _read_layers(path, seen=())
    _rebase_root(source, path.parent)
    _rebase_plugins(source, path.parent)
    return source


def _checked(source: Source, *, name: str) -> Config:
    config, problems = validate(source.values)
    problems = source.problems + problems
    problems += check(config) if config is not None else _check_rest(source.values, problems)
    if problems or config is None:
        raise config_error(problems, name=name, source=source)
    return config


def _check_rest(values: dict[str, Any], problems: list[Problem]) -> list[Problem]:
    """Contradictions among the values that are right, where some are not: the wrong ones stand at their defaults.

    What a wrong value has a part in is left out: its path, or a message that names it.
    """
    rest = copy.deepcopy(values)
    for problem in problems:
        _remove(rest, problem.path)
    config, _ = validate(rest)
    wrong = [problem.path for problem in problems]
    found = check(config) if config is not None else []
    return [problem for problem in found if not any(_concerns(problem, path) for path in wrong)]


def _remove(values: dict[str, Any], path: KeyPath) -> None:
    names = [length for length, key in enumerate(path) if isinstance(key, str)]
    holder = value_at(values, path[: names[-1]]) if names else None
    if isinstance(holder, dict):
        holder.pop(path[names[-1]], None)


def _concerns(problem: Problem, path: KeyPath) -> bool:
    shared = min(len(path), len(problem.path))
    return path[:shared] == problem.path[:shared] or dotted(path) in problem.message


def _read_layers(path: Path, *, seen: tuple[Path, ...]) -> Source:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(file.name for file in (*seen, resolved))
        raise ConfigError(f"{path}: builds on itself through `base`: {chain}")
    if len(seen) >= MAX_BASES:
        raise ConfigError(f"{path}: more than {MAX_BASES} files build on each other through `base`")
    own = read_yaml(path)
    bases = own.values.pop("base", [])
    names = [bases] if isinstance(bases, str) else bases
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        problem = Problem(path=("base",), message="must name a YAML file, or a list of them", given=bases)
        raise config_error([problem], name=str(path), source=own)
    forget_origins(own, ("base",))
    merged = Source(values={})
    for name in names:
        merged = _merged(merged, _read_layers(Path(os.path.normpath(path.parent / name)), seen=(*seen, resolved)))
    return _merged(merged, own)


def _merged(below: Source, above: Source) -> Source:
    """`above` over `below`, one layer up: mappings are merged, all else is replaced."""
    lift = 1 + max((origin.layer for origin in below.origins.values()), default=-1)
    merged = Source(
        values=copy.deepcopy(below.values), origins=dict(below.origins), problems=below.problems + above.problems
    )
    _overlay(merged.values, above.values, (), merged, above, lift)
    return merged


def _overlay(target: dict[str, Any], values: dict[str, Any], path: KeyPath, into: Source, of: Source, up: int) -> None:
    into.origins[path] = _lifted(of.origins[path], up)
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _overlay(target[key], value, here, into, of, up)
            continue
        forget_origins(into, here)
        target[key] = value
        for inner, origin in of.origins.items():
            if inner[: len(here)] == here:
                into.origins[inner] = _lifted(origin, up)


def _lifted(origin: Origin, lift: int) -> Origin:
    return Origin(text=origin.text, layer=origin.layer + lift, folder=origin.folder)


def _rebase_root(source: Source, folder: Path) -> None:
    """Make a `data.root` (or, without one, the tasks) of a base file in another folder relative to `folder`."""
    data = source.values.get("data")
    if not isinstance(data, dict):
        return
    key: KeyPath = ("data", "root") if "root" in data else ("data", "tasks")
    origin = source.origins.get(key)
    root = data.get("root", ".")
    if origin is None or origin.folder in (None, folder) or not isinstance(root, str):
        return
    data["root"] = os.path.relpath(origin.folder / root, folder) if not os.path.isabs(root) else root
    source.origins[("data", "root")] = origin


def _rebase_plugins(source: Source, folder: Path) -> None:
    """Make `plugins` of a base file in another folder relative to `folder`."""
    names, origin = source.values.get("plugins"), source.origin(("plugins",))
    if isinstance(names, list) and origin is not None and origin.folder not in (None, folder):
        start = Path(origin.folder)
        source.values["plugins"] = [
            os.path.relpath(start / name, folder) if isinstance(name, str) and not os.path.isabs(name) else name
            for name in names
        ]


def _last_duration_wins(source: Source) -> None:
    """`steps` and `epochs` say one thing: the later layer's wins, so that `--train.steps 20` works on any recipe."""
    steps, epochs = ("train", "steps"), ("train", "epochs")
    given = [path for path in (steps, epochs) if value_at(source.values, path) not in (None, NOT_GIVEN)]
    if len(given) < 2:
        return
    low, high = sorted(given, key=lambda path: source.origins[path].layer)
    if source.origins[low].layer < source.origins[high].layer:
        source.values["train"][low[-1]] = None
        source.origins[low] = source.origins[high]
