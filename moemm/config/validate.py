"""Plain values -> `Config`, strictly: no text for numbers, no 1.5 or true for whole numbers, no unknown key."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from moemm.config import fields, schema
from moemm.config.overrides import unknown_key
from moemm.config.problem import KeyPath, Problem

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_MESSAGES = {
    "missing": "is missing",
    "finite_number": "must be finite",
    "string_too_short": "is empty",
    "too_short": "holds too few values",
    "too_long": "holds too many values",
}


def validate(values: dict[str, Any]) -> tuple[schema.Config | None, list[Problem]]:
    """The configuration, or every problem of types, ranges and keys. Rules across keys are in check.py."""
    try:
        return _adapter().validate_json(json.dumps(values)), []
    except ValidationError as error:
        return None, [_problem(details, values) for details in error.errors(include_url=False)]


@cache
def _adapter() -> TypeAdapter[schema.Config]:
    for owner in vars(schema).values():
        if isinstance(owner, type) and dataclasses.is_dataclass(owner):
            owner.__pydantic_config__ = _STRICT  # type: ignore[attr-defined]
    return TypeAdapter(schema.Config)


def _problem(details: ErrorDetails, values: dict[str, Any]) -> Problem:
    path: KeyPath = details["loc"]
    if details["type"] == "unexpected_keyword_argument":
        section = fields.annotation_at(path[:-1])
        message = unknown_key(str(path[-1]), path[:-1])
        return Problem(path=path, message=message, given=details["input"], allowed=", ".join(fields.keys_of(section)))
    annotation = fields.annotation_at(path)
    allowed = fields.describe(annotation) if annotation is not None else None
    if details["type"] == "missing":
        return Problem(path=path, message="is missing", allowed=allowed)
    return Problem(path=path, message=_message(details), given=details["input"], allowed=allowed)


def _message(details: ErrorDetails) -> str:
    kind = details["type"]
    if kind in _MESSAGES:
        return _MESSAGES[kind]
    if kind.endswith("_type") or kind.endswith("_parsing") or kind == "int_from_float":
        return "has the wrong type"
    if kind.startswith(("greater", "less")):
        return "is out of range"
    return "is not one of the choices" if kind == "literal_error" else details["msg"]
