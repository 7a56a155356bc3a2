"""The dataclasses of the schema as a table: every key with its type, what it allows, its default and its help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Union

import annotated_types

from moemm.config import schema
from moemm.config.problem import KeyPath

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldInfo:
    """One key.

    path: `model.router.top_k`, `data.tasks[].weight`, `modalities.<name>.patch`.
    annotation: as in the schema, with its bounds.
    default: REQUIRED where there is none.
    section: it holds keys of its own.
    """

    path: str
    annotation: Any
    default: Any
    help: str
    section: bool

    @property
    def allowed(self) -> str:
        """What may stand there, in words."""
        return describe(self.annotation)


def all_fields(owner: type = schema.Config, prefix: str = "") -> Iterator[FieldInfo]:
    """Every key under `owner`, sections before their keys, in the order of the schema."""
    for field in dataclasses.fields(owner):
        annotation = hints(owner)[field.name]
        path = f"{prefix}{field.name}"
        child, suffix = section(annotation)
        yield FieldInfo(
            path=path,
            annotation=annotation,
            default=default_of(field),
            help=field_help(owner, field.name),
            section=child is not None,
        )
        if child is not None:
            yield from all_fields(child, f"{path}{suffix}.")


def annotation_at(path: KeyPath) -> Any | None:
    """Annotation of the value at `path`, or None where the schema has no such key; `Any` inside `deepspeed.extra`."""
    annotation: Any = schema.Config
    for key in path:
        annotation = child_annotation(annotation, key)
        if annotation is None:
            return None
    return annotation


def child_annotation(annotation: Any, key: str | int) -> Any | None:
    """Annotation of `key` inside a value annotated `annotation`, or None."""
    inner = strip(annotation)
    if inner is Any:
        return Any
    if dataclasses.is_dataclass(inner):
        return hints(typing.cast(type, inner)).get(str(key))
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict:
        return arguments[1]
    if origin in (list, tuple) and isinstance(key, int):
        return arguments[0]
    return None


def keys_of(annotation: Any) -> list[str]:
    """Names of the keys of a section; empty for anything else."""
    inner = strip(annotation)
    return [field.name for field in dataclasses.fields(inner)] if dataclasses.is_dataclass(inner) else []


@cache
def hints(owner: type) -> dict[str, Any]:
    """Annotations of a dataclass of the schema, bounds kept."""
    return typing.get_type_hints(owner, include_extras=True)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Default value of a field, or REQUIRED."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def field_help(owner: type, name: str) -> str:
    """The text under the field in the source."""
    known = (_helps().get(one.__name__, {}) for one in owner.__mro__)
    return next((texts[name] for texts in known if name in texts), "")


def strip(annotation: Any) -> Any:
    """The annotation without bounds and without `| None`."""
    while True:
        if typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif is_optional(annotation):
            annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
        else:
            return annotation


def is_optional(annotation: Any) -> bool:
    """Whether null may stand there."""
    return typing.get_origin(annotation) in (Union, types.UnionType) and type(None) in typing.get_args(annotation)


def bounds(annotation: Any) -> dict[str, Any]:
    """`ge`, `gt`, `le`, `lt` and `min_length` of the annotation, where it has them."""
    found: dict[str, Any] = {}
    while is_optional(annotation):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is not typing.Annotated:
        return found
    for extra in typing.get_args(annotation)[1:]:
        for part in extra if isinstance(extra, annotated_types.GroupedMetadata) else (extra,):
            for name in ("ge", "gt", "le", "lt", "min_length"):
                if getattr(part, name, None) is not None:
                    found[name] = getattr(part, name)
    return found


def describe(annotation: Any) -> str:
    """What an annotation allows, in words: `a whole number >= 1`, `one of sparse, dense`, `null or ...`."""
    null = " or null" if is_optional(annotation) else ""
    inner, limits = strip(annotation), bounds(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if inner is Any:
        text = "any value"
    elif dataclasses.is_dataclass(inner):
        text = f"a section with the keys {', '.join(keys_of(inner))}"
    elif origin is Literal:
        text = f"one of {', '.join(map(str, arguments))}"
    elif origin is list:
        text = f"a list{' (not empty)' if limits.get('min_length') else ''}, each: {describe(arguments[0])}"
    elif origin is tuple:
        text = f"a list of {len(arguments)}, each: {describe(arguments[0])}"
    elif origin is dict:
        text = f"a mapping from names, each: {describe(arguments[1])}"
    else:
        text = _describe_plain(inner, limits)
    return text + null


def type_text(annotation: Any) -> str:
    """Short name of the type: `int`, `list of text`, `section`."""
    inner = strip(annotation)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if dataclasses.is_dataclass(inner):
        return "section"
    if origin is Literal:
        return "choice"
    if origin in (list, tuple):
        return f"list of {type_text(arguments[0])}"
    if origin is dict:
        return f"mapping to {type_text(arguments[1])}"
    return {int: "int", float: "float", str: "text", bool: "bool", Any: "any"}[inner]


def _describe_plain(inner: Any, limits: dict[str, Any]) -> str:
    if inner is bool:
        return "true or false"
    if inner is str:
        return "text (not empty)" if limits.get("min_length") else "text"
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    parts = [f"{signs[name]} {_number(limits[name])}" for name in ("ge", "gt", "le", "lt") if name in limits]
    name = "a whole number" if inner is int else "a number"
    return f"{name} {' and '.join(parts)}".strip()


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def section(annotation: Any) -> tuple[type | None, str]:
    """The dataclass that a field holds, and what its keys' paths have after the field's name."""
    inner = strip(annotation)
    if dataclasses.is_dataclass(inner):
        return typing.cast(type, inner), ""
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if origin in (list, dict) and dataclasses.is_dataclass(strip(arguments[-1])):
        return strip(arguments[-1]), "[]" if origin is list else ".<name>"
    return None, ""


@cache
def _helps() -> dict[str, dict[str, str]]:
    """Class name -> field name -> the string that follows it in the source of the schema."""
    helps: dict[str, dict[str, str]] = {}
    for owner in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(owner, ast.ClassDef):
            continue
        texts = helps.setdefault(owner.name, {})
        for statement, after in zip(owner.body, owner.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                texts[statement.target.id] = _string(after)
    return helps


def _string(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return inspect.cleandoc(str(statement.value.value)).replace("\n", " ")
    return ""
