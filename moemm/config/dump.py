"""`Config` -> plain values, YAML (with the origin of each value beside it), and a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moemm.config.load import LoadedConfig
from moemm.config.problem import KeyPath, value_at
from moemm.config.schema import Config

_COMMENT_COLUMN = 44
_BARE = re.compile(r"(?:\.{0,2}/|[A-Za-z_])[A-Za-z0-9_./+-]*|\.{1,2}")
_RESERVED = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", ".inf", ".nan"}
_PLACES: tuple[KeyPath, ...] = (("train", "output"), ("data", "root"), ("plugins",))
"""Where things lie, not what they are: left out of the hash."""


def to_dict(config: Config) -> dict[str, Any]:
    """The complete configuration, defaults too, as dicts, lists, numbers and text; `from_dict` reads it back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def config_hash(config: Config) -> str:
    """12 hex digits of everything but where things lie (_PLACES): the same experiment has the same hash."""
    values = to_dict(config)
    for path in _PLACES:
        del value_at(values, path[:-1])[path[-1]]
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML, without comments."""
    return "".join(f"{line}\n" for line, _ in _lines(to_dict(config), ()))


def show(loaded: LoadedConfig) -> str:
    """The complete configuration as YAML, with the origin of each value as a comment."""
    lines = []
    for line, path in _lines(to_dict(loaded.config), ()):
        origin = _origin(loaded.origins, path) if path is not None else None
        lines.append(f"{line:<{_COMMENT_COLUMN}}  # {origin}\n" if origin else f"{line}\n")
    return "".join(lines)


def save_config(loaded: LoadedConfig, path: Path) -> None:
    """Write the complete configuration to `path`, with `data.root` and `plugins` as seen from there: it can be loaded
    again."""
    values = to_dict(loaded.config)
    values["plugins"] = [
        name if os.path.isabs(name) else os.path.relpath(file.resolve(), path.parent.resolve())
        for name, file in zip(loaded.config.plugins, loaded.plugin_files, strict=True)
    ]
    if not os.path.isabs(values["data"]["root"]):
        values["data"]["root"] = os.path.relpath(loaded.data_root.resolve(), path.parent.resolve())
    path.write_text("".join(f"{line}\n" for line, _ in _lines(values, ())), encoding="utf-8")


def _lines(values: dict[str, Any], path: KeyPath, indent: str = "") -> Iterator[tuple[str, KeyPath | None]]:
    """Lines of YAML, each with the path of the value on it (None for a section's own line)."""
    for key, value in values.items():
        here = (*path, key)
        if isinstance(value, dict) and value:
            yield f"{indent}{_plain(key)}:", None
            yield from _lines(value, here, indent + "  ")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            yield f"{indent}{_plain(key)}:", None
            for index, item in enumerate(value):
                inner = list(_lines(item, (*here, index), indent + "    "))
                yield f"{indent}  - {inner[0][0].lstrip()}", inner[0][1]
                yield from inner[1:]
        else:
            yield f"{indent}{_plain(key)}: {_plain(value)}", here


def _plain(value: Any) -> str:
    """One value on one line, such that readers of YAML 1.1, of 1.2 and of JSON's text agree on what it is."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_plain(key)}: {_plain(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        bare = _BARE.fullmatch(value) and value.lower() not in _RESERVED
        return value if bare else _quoted(value)
    return json.dumps(value)


def _float(value: float) -> str:
    """YAML 1.1 knows an exponent only behind a dot: 1.0e-05."""
    text = repr(value)
    if not math.isfinite(value):
        return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}[text]
    return re.sub(r"^(-?\d+)e", r"\1.0e", text)


def _quoted(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in quoted)


def _origin(origins: dict[KeyPath, str], path: KeyPath) -> str:
    """Origin of the value at `path`; a value inside one that was given as a whole has that one's."""
    return origins.get(path, "default")
