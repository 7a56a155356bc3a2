"""What installed packages add: entry points, found without importing them, loaded when their name is asked for."""

from __future__ import annotations

import traceback
from importlib.metadata import entry_points
from typing import Any

from moemm.errors import ConfigError

GROUP = {
    "modality": "moemm.modalities",
    "router": "moemm.routers",
    "harmonizer": "moemm.harmonizers",
    "objective": "moemm.objectives",
}
"""What is registered -> the group of entry points that names it."""


def entry_names(what: str) -> set[str]:
    """Names that installed packages offer; what: a key of GROUP."""
    return {entry.name for entry in entry_points(group=GROUP[what])}


def load_entry(what: str, name: str, registry: dict[str, Any]) -> Any:
    """What the package that offers `name` has under it, its module imported; None where no package does.

    Raises ConfigError where the import fails; `registry` is then as before.
    """
    for entry in entry_points(group=GROUP[what], name=name):
        before = dict(registry)
        try:
            return entry.load()
        except Exception as error:
            registry.clear()
            registry.update(before)
            package = entry.dist.name if entry.dist else "a package"
            raise ConfigError(
                f"{what} {name!r}: {package} offers it as {entry.value}, but {failure(error)}\n"
                "  to do: repair or update the package"
            ) from error
    return None


def failure(error: BaseException, *, file: str | None = None) -> str:
    """`FILE:LINE raised NAME: message`: the last line of `file` that was reached, or of any file."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames if file is None or frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename and file in (None, error.filename):
        places.append((error.filename, error.lineno))
    where = f"{places[-1][0]}:{places[-1][1]}" if places else file or "it"
    lines = (error.msg if isinstance(error, SyntaxError) else str(error)).splitlines()
    return f"{where} raised {type(error).__name__}{f': {lines[0]}' if lines else ''}"
