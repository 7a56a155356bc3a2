"""One problem of a configuration, where each value came from, and the error that lists all problems at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moemm.errors import ConfigError

KeyPath = tuple[str | int, ...]
"""`("data", "tasks", 0, "weight")`; written `data.tasks.0.weight`."""

NOT_GIVEN = object()
"""Marks a problem about something that is absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value came from.

    text: `recipe.yaml:14` or `command line --model.dim`.
    layer: a later layer overrides an earlier one (base file < recipe < command line).
    folder: of the file that it stands in; None on the command line.
    """

    text: str
    layer: int = 0
    folder: Path | None = None


@dataclass(slots=True, kw_only=True)
class Source:
    """A configuration before it is checked: plain values, the origin of each, and what was wrong on the way."""

    values: dict[str, Any]
    origins: dict[KeyPath, Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin | None:
        """Origin of the value at `path`, or of the nearest section around it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong. `given` is the value as it was read; `allowed` says what may stand there."""

    path: KeyPath
    message: str
    given: Any = NOT_GIVEN
    allowed: str | None = None

    def text(self, source: Source | None) -> str:
        """Two or three lines: dotted path and message; value and origin; what is allowed."""
        lines = [f"  {dotted(self.path) or 'the file'}: {self.message}"]
        origin = source.origin(self.path) if source else None
        if self.given is not NOT_GIVEN:
            lines.append(f"    given:   {short(self.given)}{f' ({origin.text})' if origin else ''}")
        elif origin:
            lines.append(f"    where:   {origin.text}")
        if self.allowed:
            lines.append(f"    allowed: {self.allowed}")
        return "\n".join(lines)


def dotted(path: KeyPath) -> str:
    """`data.tasks.0.weight`."""
    return ".".join(map(str, path))


def short(value: Any, *, limit: int = 100) -> str:
    """`value` as it would stand in the file, cut to `limit` characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def config_error(problems: Sequence[Problem], *, name: str, source: Source | None = None) -> ConfigError:
    """The one error that lists every problem of the configuration called `name` (a path, mostly)."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    parts = [f"{name}: {count} in the configuration"]
    parts += [problem.text(source) for problem in problems]
    parts.append("  `moemm config explain KEY` says what a key takes; without KEY it lists all keys.")
    return ConfigError("\n\n".join(parts))


def value_at(values: Any, path: KeyPath) -> Any:
    """The value at `path`, or NOT_GIVEN."""
    for key in path:
        in_list = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if not in_list and not (isinstance(values, Mapping) and key in values):
            return NOT_GIVEN
        values = values[key]
    return values
