"""YAML -> plain values with the line of each: YAML 1.2's plain types only, and nothing that a file could do harm with.

Refused: duplicate keys, tags, merge keys, several documents, and files that are large or that anchors make large.
Against YAML 1.1, as PyYAML reads it: `3e-4` is a number, `yes` and `on` are text, `012` is twelve.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from moemm.config.problem import KeyPath, Origin, Problem, Source
from moemm.config.suggest import missing_path
from moemm.errors import ConfigError

MAX_BYTES = 64 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 32
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
_TOO_MANY = f"more than {MAX_VALUES} values once aliases are expanded"

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "bool": (r"true|false|True|False|TRUE|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", lambda text: int(text, 0 if text[:2] in ("0x", "0o") else 10)),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(re.sub(r"\.(?=[iInN])", "", text)),
    ),
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "str": (r"", lambda text: text),
}


class _TooMuchError(Exception):
    """What there is too much of, after the line where it is noticed."""


class _Loader(yaml.SafeLoader):
    """Only composes; the values are made here, so that no constructor of PyYAML ever runs."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own way)
    _depth, _values = -1, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The node that comes next, with all that it holds; _TooMuchError before PyYAML has read on."""
        is_key = isinstance(parent, yaml.MappingNode) and index is None
        self._depth += 1
        self._values += not is_key
        if self._depth > MAX_DEPTH:
            raise _TooMuchError(f"{self._here()}: {_TOO_DEEP}")
        if self._values > MAX_VALUES:
            raise _TooMuchError(f"{self._here()}: {_TOO_MANY}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _here(self) -> int:
        line: int = self.peek_event().start_mark.line + 1
        return line


for _name, (_pattern, _) in _SCALARS.items():
    if _name != "str":
        _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(rf"^(?:{_pattern})$"), None)


def read_yaml(path: Path, *, layer: int = 0) -> Source:
    """The file at `path`; raises ConfigError if it is missing, not YAML, not a mapping, or hostile.

    Duplicate keys and the like are noted in the `problems` of the result.
    """
    if not path.exists():
        raise ConfigError(missing_path(path, what="config file"))
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise ConfigError(f"{path}: is {kind}; a YAML file is wanted")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES // 1024} KiB; that is no configuration of moemm")
    source = _read(content, name=str(path), layer=layer, folder=path.parent)
    if source is None:
        raise ConfigError(f"{path}: is empty\n  the least that a config needs: data.tasks, with `name` and `file` each")
    if not isinstance(source.values, dict):
        raise ConfigError(f"{path}: holds {_type_name(source.values)}; allowed: a mapping with data, model, train, ...")
    return source


def read_value(text: str, *, name: str) -> Any:
    """One value from the command line, read as YAML: `128`, `3e-4`, `[4, 4]`, `{a: b}`, `null`."""
    source = _read(text.encode("utf-8", "surrogateescape"), name=name, layer=0, folder=None)
    if source and source.problems:
        raise ConfigError("; ".join(problem.message for problem in source.problems))
    return None if source is None else source.values


def _read(content: bytes, *, name: str, layer: int, folder: Path | None) -> Source | None:
    try:
        node = yaml.compose(content, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not YAML: {_syntax(error)}") from error
    except _TooMuchError as error:
        raise ConfigError(f"{name}:{error}") from error
    if node is None:
        return None
    converter = _Converter(name=name, layer=layer, folder=folder)
    return Source(values=converter.convert(node, ()), origins=converter.origins, problems=converter.problems)


class _Converter:
    """Nodes -> values, counting as it goes: an alias is expanded, so that a bomb of anchors is noticed early."""

    def __init__(self, *, name: str, layer: int, folder: Path | None) -> None:
        self.name, self.layer, self.folder = name, layer, folder
        self.origins: dict[KeyPath, Origin] = {}
        self.problems: list[Problem] = []

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        if len(path) > MAX_DEPTH:
            raise ConfigError(f"{self.name}:{_line(node)}: {_TOO_DEEP} (an alias inside itself?)")
        if len(self.origins) >= MAX_VALUES:
            raise ConfigError(f"{self.name}:{_line(node)}: {_TOO_MANY}")
        self.origins[path] = Origin(text=f"{self.name}:{_line(node)}", layer=self.layer, folder=self.folder)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str) or key == "<<":
                self._problem(path, f"line {_line(key_node)}: a key must be a plain name: no list, no `<<`")
                continue
            value = self.convert(value_node, (*path, key))
            if key in values:
                self._problem((*path, key), f"given twice, in lines {lines[key]} and {_line(key_node)}; keep one")
            values[key], lines[key] = value, _line(key_node)
        return values

    def _scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if not isinstance(node, yaml.ScalarNode) or kind not in _SCALARS:
            self._problem(path, f"the tag {node.tag} is not allowed; allowed: plain numbers, text, lists and mappings")
            return None
        try:
            return _SCALARS[kind][1](node.value)
        except ValueError:
            self._problem(path, f"{node.value[:40]!r} cannot be read as {kind}")
            return None

    def _problem(self, path: KeyPath, message: str) -> None:
        self.problems.append(Problem(path=path, message=message))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        context = f" ({error.context})" if error.context else ""
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}{context}"
    return str(error).splitlines()[0]


def _type_name(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "nothing"}.get(type(value), f"one {type(value).__name__}")
