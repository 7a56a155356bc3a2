"""Values from the command line: `--model.dim 128`, `--model.dim=128`, `--data.tasks.adult.weight 2`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from moemm.config import fields, schema
from moemm.config.problem import NOT_GIVEN, KeyPath, Origin, Problem, Source, dotted, value_at
from moemm.config.suggest import did_you_mean, listed, nearest
from moemm.config.yaml_source import read_value
from moemm.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True)
class Override:
    """One option as it was typed: `--model.dim` and `128`; `text` is None where no value followed."""

    option: str
    text: str | None


def split_overrides(arguments: Sequence[str], own: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """The arguments that are no overrides, and those that are.

    An override starts with `--` and has a dot in its name or is a top-level key of the config. own: options, with their
    dashes, that are none in any case (`--data` of `moemm extend`).
    """
    rest: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        if arguments[position] == "--":
            return rest + list(arguments[position:]), overrides
        option = arguments[position].partition("=")[0].replace("_", "-")
        count = 0 if option in own else _override_length(arguments[position : position + 2])
        (overrides if count else rest).extend(arguments[position : position + max(count, 1)])
        position += max(count, 1)
    return rest, overrides


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """The overrides as pairs; raises ConfigError for an argument that is none. Dashes may be left out."""
    parsed: list[Override] = []
    remaining = [_with_dashes(argument) for argument in arguments]
    while remaining:
        count = _override_length(remaining[:2])
        if not count:
            raise ConfigError(
                f"command line: {remaining[0]!r} is no override; write --KEY VALUE or --KEY=VALUE (--model.dim 128)"
            )
        option, equals, text = remaining[0].partition("=")
        parsed.append(Override(option, text if equals else remaining[1] if count == 2 else None))
        remaining = remaining[count:]
    return parsed


def plugin_overrides(files: Sequence[Path | str]) -> list[str]:
    """Files of --plugin, relative to the working directory, as an override of the key `plugins`."""
    return [f"--plugins={json.dumps([os.path.abspath(file) for file in files])}"] if files else []


def apply_overrides(source: Source, arguments: Sequence[str], *, layer: int) -> None:
    """Put the overrides into `source`; one that fits nowhere is noted in its `problems`."""
    for override in parse_overrides(arguments):
        problem = _apply(source, override, layer=layer)
        if problem:
            source.origins[problem.path] = Origin(text=f"command line {override.option}", layer=layer)
            source.problems.append(problem)


def forget_origins(source: Source, path: KeyPath) -> None:
    """Drop the origins of all that stood under `path`."""
    for known in [known for known in source.origins if known[: len(path)] == path]:
        del source.origins[known]


def _with_dashes(argument: str) -> str:
    return f"--{argument}" if re.match(r"[\w.-]+=", argument) and not argument.startswith("-") else argument


def _override_length(arguments: Sequence[str]) -> int:
    """How many of the (one or two) arguments belong to the override that starts there; 0 where none does."""
    option, equals, _ = arguments[0].partition("=")
    name = option[2:]
    top = name.replace("-", "_") in fields.keys_of(schema.Config)
    if not option.startswith("--") or not name or not ("." in name or top):
        return 0
    takes_next = not equals and len(arguments) > 1 and not _is_option(arguments[1])
    return 2 if takes_next else 1


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and not re.fullmatch(r"-(\.?[0-9].*|\.inf)", argument)


def _apply(source: Source, override: Override, *, layer: int) -> Problem | None:
    found = _resolve(source.values, override.option[2:].split("."))
    if isinstance(found, Problem):
        return found
    path, annotation = found
    if override.text is None:
        return Problem(path=path, message=f"{override.option} needs a value", allowed=fields.describe(annotation))
    try:
        value = _value(override, annotation)
    except ConfigError as error:
        return Problem(path=path, message=str(error), given=override.text, allowed=fields.describe(annotation))
    return _put(source, path, value, Origin(text=f"command line {override.option}", layer=layer))


def _value(override: Override, annotation: Any) -> Any:
    """Text keys take the text as typed (`--train.output 2024`); all others read it as YAML."""
    text = override.text or ""
    if fields.strip(annotation) is str and not (fields.is_optional(annotation) and text in ("null", "~", "")):
        return text
    return read_value(text, name=override.option)


def _resolve(values: Any, parts: Sequence[str]) -> tuple[KeyPath, Any] | Problem:
    """The path that the typed parts mean, and the annotation of what stands there."""
    annotation: Any = schema.Config
    path: list[str | int] = []
    for part in parts:
        here = value_at(values, tuple(path))
        key = _key(annotation, here, part)
        if key is None:
            return _unknown(annotation, here, tuple(path), part)
        path.append(key)
        annotation = fields.child_annotation(annotation, key)
    return tuple(path), annotation


def _key(annotation: Any, here: Any, part: str) -> str | int | None:
    """`part` as the key that it means inside a value `here` of type `annotation`; None where there is none."""
    if isinstance(here, list):
        names = [item.get("name") for item in here if isinstance(item, dict)]
        index = names.index(part) if part in names else int(part) if part.isdecimal() else len(here)
        return index if index < len(here) else None
    known = fields.keys_of(annotation) or (list(here) if isinstance(here, dict) else [])
    for candidate in (part, part.replace("-", "_")):
        if candidate in known:
            return candidate
    open_ended = not fields.keys_of(annotation) and fields.child_annotation(annotation, part) is not None
    return part if part and open_ended else None


def _unknown(annotation: Any, here: Any, path: KeyPath, part: str) -> Problem:
    known = fields.keys_of(annotation)
    place = dotted(path) or "the config"
    if isinstance(here, list):
        names = [str(item["name"]) for item in here if isinstance(item, dict) and "name" in item]
        entries = f"names {listed(names)}, or 0 to {len(here) - 1}" if names else f"0 to {len(here) - 1}"
        return Problem(
            path=(*path, part), message=f"{place} has no such entry{did_you_mean(part, names)}", allowed=entries
        )
    if not known:
        return Problem(path=(*path, part), message=f"{place} is a single value, it holds no keys")
    return Problem(path=(*path, part), message=unknown_key(part, path), allowed=", ".join(known))


def unknown_key(name: str, path: KeyPath) -> str:
    """Message for a key `name` that the section at `path` has not: the nearest one, here or elsewhere."""
    plain = name.replace("-", "_")
    known = fields.keys_of(fields.annotation_at(path))
    match = nearest(plain, known)
    elsewhere = [info.path for info in fields.all_fields() if info.path.rpartition(".")[2] == plain]
    close = [dotted((*path, match))] if match else []
    if not close and not elsewhere:
        leaves = {info.path.rpartition(".")[2]: info.path for info in fields.all_fields()}
        leaf = nearest(plain, leaves)
        elsewhere = [leaves[leaf]] if leaf else []
    options = close + elsewhere if not match or match.replace("_", "") != plain.replace("_", "") else close
    return f"unknown key; did you mean {' or '.join(options[:3])}?" if options else "unknown key"


def _put(source: Source, path: KeyPath, value: Any, origin: Origin) -> Problem | None:
    """Set the value at `path`, making the sections around it; a mapping is merged into one that is there."""
    holder: Any = source.values
    for length, key in enumerate(path[:-1], start=1):
        child = holder[key] if isinstance(key, int) else holder.get(key)
        if child is None:
            child = holder[key] = {}
        if not isinstance(child, dict | list):
            return Problem(path=path[:length], message=f"is a value, so that {origin.text} has no place", given=child)
        holder = child
    before = value_at(holder, path[-1:])
    if before is NOT_GIVEN or not (isinstance(before, dict) and isinstance(value, dict)):
        forget_origins(source, path)
        holder[path[-1]] = value
        source.origins[path] = origin
        return None
    for key, inner in value.items():
        _put(source, (*path, key), inner, origin)
    return None
