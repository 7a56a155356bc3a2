"""`--array train.lr=1e-3,1e-4`: one configuration for each combination of values, each with a run folder of its own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moemm.errors import LaunchError

MAX_POINTS = 1000
"""SLURM's default MaxArraySize is 1001."""


@dataclass(frozen=True, slots=True)
class Point:
    """One task of an array: its overrides as on the command line, and the name of its folder."""

    overrides: list[str]
    name: str


def sweep(axes: Sequence[str], *, output: str) -> list[Point]:
    """All combinations of `KEY=VALUE,VALUE` in order, the last key fastest; no axes: no points.

    output: train.output without the sweep; a combination writes to OUTPUT-sweep/NAME, unless the sweep sets that key.
    Raises LaunchError for an axis without values, a key or a value that is given twice, too many combinations.
    """
    parsed = [_axis(text) for text in axes]
    keys = [key for key, _ in parsed]
    _refuse_doubles(keys, what="--array: the key")
    shown = [key.rpartition(".")[2] for key in keys]
    shown = shown if len(set(shown)) == len(shown) else keys
    combinations = list(itertools.product(*(values for _, values in parsed))) if parsed else []
    if len(combinations) > MAX_POINTS:
        raise LaunchError(f"--array makes {len(combinations)} combinations; by default SLURM takes {MAX_POINTS}.")
    points = [_point(keys, shown, values, output) for values in combinations]
    _refuse_doubles([point.name for point in points], what="--array: two combinations are written alike:")
    return points


def _axis(text: str) -> tuple[str, list[str]]:
    key, equals, listed = text.removeprefix("--").partition("=")
    values = [value.strip() for value in re.split(r",(?![^\[]*\])", listed)]  # not at commas in [brackets]
    if not equals or not key or not all(values):
        raise LaunchError(f"--array {text!r}: write KEY=VALUE,VALUE, with a key of the configuration: train.lr=1,2")
    _refuse_doubles(values, what=f"--array {key}: the value")
    return key, values


def _point(keys: Sequence[str], shown: Sequence[str], values: Sequence[str], output: str) -> Point:
    plain = [re.sub(r"[^A-Za-z0-9._+]+", "-", value) for value in values]
    name = "-".join(f"{key}_{value}" for key, value in zip(shown, plain, strict=True))
    overrides = [part for key, value in zip(keys, values, strict=True) for part in (f"--{key}", value)]
    if "train.output" not in keys:
        overrides += ["--train.output", f"{output.rstrip('/')}-sweep/{name}"]
    return Point(overrides, name)


def _refuse_doubles(names: Sequence[str], *, what: str) -> None:
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise LaunchError(f"{what} {double} is given twice.")
