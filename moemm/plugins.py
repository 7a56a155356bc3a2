"""Python files of the user's own that register modalities, routers, harmonizers and objectives.

Code runs only where the user named it: in a configuration, on the command line, or as an argument. A run folder keeps a
copy of each file, and loading a run executes that copy; but a run folder may come from anywhere, so that a copy counts
as named only where this user has run the very same bytes before: their sha256 is then in `known_file()`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moemm.config import LoadedConfig, load_config
from moemm.config.entry import failure
from moemm.config.overrides import plugin_overrides
from moemm.config.suggest import missing_path
from moemm.errors import CheckpointError, ConfigError
from moemm.harmonize import HARMONIZERS
from moemm.modalities import KINDS
from moemm.moe import ROUTERS
from moemm.objectives import OBJECTIVES

FOLDER = "plugins"
"""Of a run folder: the copies, each named by its file and the first digits of its sha256."""
MAX_BYTES = 2**20
_DIGITS = 16
_COPY = re.compile(rf".+-([0-9a-f]{{{_DIGITS}}})\.py")
_REGISTRIES: dict[str, dict[str, Any]] = {
    "modality": KINDS, "router": ROUTERS, "harmonizer": HARMONIZERS, "objective": OBJECTIVES,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plugin:
    """A file that was run. registered: (`modality`, its kind), (`router`, its name) ... of what it added."""

    path: Path
    sha256: str
    module: str
    registered: tuple[tuple[str, str], ...]


_LOADED: dict[str, Plugin] = {}
"""sha256 -> what this process has run."""


def load_plugins(loaded: LoadedConfig, *, stored: bool = False) -> list[Plugin]:
    """Run the files of `plugins`; what this process has run already stays as it is.

    stored: `loaded` is the config.yaml of a run folder, whose files run only where this user has named them before.
    Raises ConfigError (see load_plugin), CheckpointError where a run's copy is missing or was changed.
    """
    named = loaded.origins.get(("plugins",), "").startswith("command line")
    folder = loaded.path.parent
    if not named and (stored or _is_run(folder)):
        return [_load_copy(file, folder) for file in loaded.plugin_files]
    return [load_plugin(file) for file in loaded.plugin_files]


def load_stored(folder: Path, config: str, plugins: Sequence[Path | str] = ()) -> LoadedConfig:
    """The configuration of a run folder, its plugins run. plugins: files to run in place of the run's own copies."""
    loaded = load_config(folder / config, plugin_overrides(plugins))
    found = load_plugins(loaded, stored=True)
    if plugins:
        given = {plugin.sha256[:_DIGITS] for plugin in found}
        for name in load_config(folder / config).config.plugins:
            if _digits(Path(name)) not in given:
                warnings.warn(f"{folder} was made with {name}, which is not among the plugins given", stacklevel=3)
    return loaded


def beside_own(folder: Path, config: str, files: Sequence[Path | str]) -> list[Path]:
    """`files` behind the run's own copies, for a run that is to grow; a file takes the place of a copy of its name.

    Runs them all; empty where `files` is. config: name of the run's configuration in `folder`. Raises as load_plugins.
    """
    given = [Path(os.path.abspath(file)) for file in files]
    if not given or not (folder / config).is_file():
        return given
    names = {_stem(file) for file in given}
    own = [file for file in load_config(folder / config).plugin_files if _stem(file) not in names]
    for file in own:
        _load_copy(file, folder)
    for file in given:
        load_plugin(file)
    return [*(Path(os.path.abspath(file)) for file in own), *given]


def load_plugin(path: Path | str) -> Plugin:
    """Run a Python file that registers something, and note that this user named it.

    Running it again, changed, in one process replaces what it registered before.
    Raises ConfigError: no such file; it raises; it registers nothing, or a name that is taken. Nothing of it stays.
    """
    plugin = _run(Path(path), _read(Path(path)))
    _remember(plugin)
    return plugin


def copy_plugins(loaded: LoadedConfig, folder: Path) -> list[str]:
    """Copy the files of `plugins` into a run folder; the names that `plugins` then has there. Raises OSError."""
    names = []
    for file in loaded.plugin_files:
        code = _read(file)
        copy = folder / FOLDER / f"{_stem(file)}-{_hash(code)[:_DIGITS]}.py"
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(code)
        names.append(f"{FOLDER}/{copy.name}")
    return names


def check_unchanged(stored: Sequence[str], plugins: Sequence[Plugin], *, folder: Path) -> None:
    """Refuse to go on with a run whose code is not what it began with. stored: `plugins` of its config.yaml.

    Raises CheckpointError.
    """
    before, now = {_digits(Path(name)) for name in stored}, {plugin.sha256[:_DIGITS] for plugin in plugins}
    if before == now:
        return
    named = ", ".join(f"{plugin.path} ({plugin.sha256[:_DIGITS]})" for plugin in plugins) or "none"
    copies = [f"--plugin {folder / name}" for name in stored]
    raise CheckpointError(
        f"plugins: the code is not what {folder} began with\n  given:   {named}\n"
        f"  allowed: {', '.join(stored) or 'none'}\n"
        f"  to do: go on with the run's own copy ({' '.join(copies) or 'leave `plugins` out'}), or train anew in "
        "another folder (--train.output NAME)"
    )


def known_file() -> Path | None:
    """Where the sha256 of every plugin is noted that this user has named; None without a home folder."""
    try:
        folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    except RuntimeError:
        return None
    return Path(folder) / "moemm" / "plugins.txt"


def _is_run(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("catalogue.json", "modalities.json"))


def _load_copy(file: Path, folder: Path) -> Plugin:
    if not file.is_file():
        raise CheckpointError(
            f"{folder} was made with {file.name}, which is not there\n"
            "  to do: put it back from a copy, or give the file with --plugin FILE"
        )
    code = _read(file)
    sha256 = _hash(code)
    if _digits(file) not in ("", sha256[:_DIGITS]):
        raise CheckpointError(
            f"{file} was changed: its sha256 begins with {sha256[:_DIGITS]}, that of its name is {_digits(file)}\n"
            "  to do: put it back from a copy, or give the right file with --plugin FILE"
        )
    if sha256 not in _LOADED and sha256 not in _known():
        raise ConfigError(
            f"{folder} wants to run code, {file} (sha256 {sha256}), which you have not run before\n"
            "  allowed: files that you name yourself; a run folder from elsewhere runs nothing\n"
            f"  to do: read it; if you trust it, add --plugin {file} (in Python, load_run(..., plugins=[...])) once"
        )
    return _run(file, code)


def _read(path: Path) -> bytes:
    if not path.exists():
        raise ConfigError(missing_path(path, what="plugin file"))
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"plugin {path}: is no Python file; allowed: one file that ends in .py")
    try:
        code = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"plugin {path}: cannot be read: {error.strerror or error}") from error
    if len(code) > MAX_BYTES:
        raise ConfigError(f"plugin {path}: has {len(code)} bytes; allowed: {MAX_BYTES}")
    return code


def _run(path: Path, code: bytes) -> Plugin:
    sha256 = _hash(code)
    if sha256 in _LOADED:
        return _LOADED[sha256]
    before = {what: dict(registry) for what, registry in _REGISTRIES.items()}
    earlier = [plugin for plugin in _LOADED.values() if plugin.path.resolve() == path.resolve()]
    for what, name in (one for plugin in earlier for one in plugin.registered):
        _REGISTRIES[what].pop(name, None)
    module = f"moemm_plugin_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{sha256[:8]}"
    try:
        found = _execute(path, code, module, sha256)
    except BaseException:
        sys.modules.pop(module, None)
        for what, registry in _REGISTRIES.items():
            registry.clear()
            registry.update(before[what])
        raise
    for plugin in earlier:
        del _LOADED[plugin.sha256]
    _LOADED[sha256] = found
    return found


def _execute(path: Path, code: bytes, module: str, sha256: str) -> Plugin:
    """Run it as a module that pickles, and so data loader workers, can find by name."""
    before = {what: set(registry) for what, registry in _REGISTRIES.items()}
    made = sys.modules[module] = ModuleType(module)
    made.__file__ = str(path)
    try:
        exec(compile(code, str(path), "exec"), made.__dict__)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"plugin {path}: {failure(error, file=str(path))}\n  nothing of it was registered\n"
            f"  to do: `python {path}` shows the whole traceback; correct the file, or leave it out of `plugins`"
        ) from error
    added = tuple(
        (what, name) for what, registry in _REGISTRIES.items() for name in registry if name not in before[what]
    )
    if not added:
        raise ConfigError(
            f"plugin {path}: registers nothing\n"
            "  allowed: a file with @moemm.register_modality, register_router, register_harmonizer or "
            "register_objective\n  to do: decorate what it defines, or leave it out of `plugins`"
        )
    return Plugin(path, sha256, module, added)


def _hash(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


def _digits(file: Path) -> str:
    """The digits of the sha256 in the name of a run's copy; empty for another file."""
    match = _COPY.fullmatch(file.name)
    return match[1] if match else ""


def _stem(file: Path) -> str:
    """Name of the file without its suffix, and without the digits that a run's copy has behind it."""
    match = _COPY.fullmatch(file.name)
    return file.stem[: match.start(1) - 1] if match else file.stem


def _known() -> set[str]:
    path = known_file()
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except (OSError, ValueError):
        return set()
    return {line.split()[0] for line in lines if line.strip()}


def _remember(plugin: Plugin) -> None:
    """Note it; where that cannot be written, --plugin has to be given for runs too."""
    path = known_file()
    if path is None or plugin.sha256 in _known():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{plugin.sha256}  {plugin.path.resolve()}\n")
    except OSError:
        pass
