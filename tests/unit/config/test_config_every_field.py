"""Every key with wrong types, a typo, and values out of range: all refused, all naming the key."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from moemm.config import fields as schema_fields
from moemm.config import from_dict
from moemm.config.fields import FieldInfo
from moemm.config.problem import KeyPath, dotted
from moemm.errors import ConfigError

GIVEN: dict[str, Any] = {
    "data": {"tasks": [{"name": "a", "file": "a.h5"}]},
    "modalities": {"image": {}},
    "model": {"experts": {"groups": [{"kind": "shared", "width": 8}]}, "extensions": [{"name": "b"}]},
    "train": {"epochs": 2},
}
WRONG = {
    int: ["yes", 1.5, True, [1], {"a": 1}],
    float: ["fast", "1.0", True, [1.0], {"a": 1}],
    str: [3, 1.5, True, ["a"], {"a": 1}],
    bool: ["yes", "true", 1, 0.0, []],
    list: ["a", 3, {"a": 1}],
    tuple: ["a", 3, {"a": 1}, [], [0.5, 0.5, 0.5]],
    dict: ["a", 3, [1], True],
}
STEP = {"ge": -1, "gt": 0, "le": 1, "lt": 0}


def wrong_values(annotation: Any) -> Iterator[Any]:
    inner = schema_fields.strip(annotation)
    limits = schema_fields.bounds(annotation)
    kind = typing.get_origin(inner) or inner
    if dataclasses.is_dataclass(inner):
        yield from WRONG[dict]
    elif kind is Literal:
        yield from ["nope", 3, True, typing.get_args(inner)[0].upper(), ""]
    else:
        yield from WRONG[kind]
    if not schema_fields.is_optional(annotation):
        yield None
    if kind is float:
        yield from [float("nan"), float("inf"), float("-inf")]
    yield from (limits[name] + step for name, step in STEP.items() if name in limits)
    if limits.get("min_length"):
        yield "" if kind is str else []


def concrete(path: str) -> KeyPath:
    parts = re.sub(r"\[\]", ".0", path).replace("<name>", "image").split(".")
    return tuple(int(part) if part.isdigit() else part for part in parts)


def spoilt(path: KeyPath, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(GIVEN)
    holder: Any = values
    for key in path[:-1]:
        holder = holder[key] if isinstance(key, int) else holder.setdefault(key, {})
    holder[path[-1]] = value
    return values


def cases() -> list[tuple[FieldInfo, Any]]:
    return [(info, value) for info in schema_fields.all_fields() for value in wrong_values(info.annotation)]


@pytest.mark.parametrize("info", list(schema_fields.all_fields()), ids=lambda info: info.path)
def test_wrong_values_are_refused_by_name(info: FieldInfo) -> None:
    path = concrete(info.path)
    for value in wrong_values(info.annotation):
        with pytest.raises(ConfigError, match=re.escape(dotted(path))) as caught:
            from_dict(spoilt(path, value), origin="a test")
        assert "allowed:" in str(caught.value), value


@pytest.mark.parametrize("info", list(schema_fields.all_fields()), ids=lambda info: info.path)
def test_typos_are_refused_with_the_nearest_name(info: FieldInfo) -> None:
    path = concrete(info.path)
    name = str(path[-1])
    for typo in {name + name[-1], name[0] + name, "x" + name} - {"xx"}:
        with pytest.raises(ConfigError) as caught:
            from_dict(spoilt((*path[:-1], typo), 1), origin="a test")
        message = str(caught.value)
        assert f"{dotted((*path[:-1], typo))}: unknown key; did you mean" in message
        assert dotted(path) in message


def test_there_are_three_wrong_values_a_field_at_least() -> None:
    counts = Counter(info.path for info, _ in cases())
    assert min(counts.values()) >= 3
    assert len(cases()) >= 300


def test_all_problems_come_at_once() -> None:
    values = spoilt(("model", "dim"), "wide")
    values["train"] |= {"lr": 0, "preecision": "bf16", "batch_size": 6, "accumulation": 4}
    values["deepspeed"] = {"extra": {"zero_optimisation": {"stage": 2}}}
    with pytest.raises(ConfigError) as caught:
        from_dict(values, origin="a test")
    message = str(caught.value)
    assert message.startswith("a test: 5 problems")
    for path in ("model.dim", "train.lr", "train.preecision", "train.batch_size", "deepspeed.extra.zero_optimisation"):
        assert f"  {path}: " in message
    assert "did you mean zero_optimization?" in message


def test_a_wrong_value_brings_no_follow_up_errors() -> None:
    values = spoilt(("train", "epochs"), "many") | {"model": {"dim": 30.5, "heads": 5}}
    with pytest.raises(ConfigError, match="2 problems"):
        from_dict(values, origin="a test")


def test_every_key_has_help() -> None:
    assert not [info.path for info in schema_fields.all_fields() if not info.help]
