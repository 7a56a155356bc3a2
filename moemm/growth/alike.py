"""Whether runs can be averaged: the same model, the same modalities down to what was fitted, the same tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moemm.errors import CheckpointError, ConfigError
from moemm.growth.grown import Base
from moemm.modalities import specs_to_dict
from moemm.train.init import OF_THE_RUN, WHILE_TRAINING
from moemm.train.setup import describe

_TRAINING = ("dropout", "attention")
"""Keys of `model` that change no weight's meaning; besides, router.losses and experts.backend."""
_SHOWN = 60


def check_alike(bases: Sequence[Base]) -> None:
    """Refuse runs that cannot be averaged. Raises ConfigError that names the first difference, CheckpointError for
    weights that are not finite.
    """  # fmt: skip
    first = bases[0]
    for base in bases:
        _check_finite(base)
    for other in bases[1:]:
        _compare(first, other, "models", _model, "train both with the same `model` section")
        fitted = "train on the same files, or begin the second run with the first (train.init), which takes them over"
        _compare(first, other, "modalities", _modalities, fitted)
        _compare(first, other, "tasks", _tasks, "train both on the same data.tasks and files")
        _compare(first, other, "tensors", _tensors, "train both with the same objectives and options of modalities")


def own_weights(base: Base) -> dict[str, torch.Tensor]:
    """The weights of a run without what it knows of how its own losses went."""
    return {name: value for name, value in base.weights.items() if not name.startswith(OF_THE_RUN)}


def first_difference(one: Any, other: Any, path: str = "") -> tuple[str, str, str] | None:
    """Dotted place of the first value that differs between two JSON values, and both there; None where none does."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in [*one, *(key for key in other if key not in one)]:
            here = f"{path}.{key}" if path else str(key)
            if key not in one or key not in other:
                left, right = (_short(side[key]) if key in side else "nothing" for side in (one, other))
                return here, left, right
            found = first_difference(one[key], other[key], here)
            if found is not None:
                return found
        return None
    if isinstance(one, list) and isinstance(other, list):
        for number, (left, right) in enumerate(zip(one, other, strict=False)):
            found = first_difference(left, right, f"{path}.{number}")
            if found is not None:
                return found
        return None if len(one) == len(other) else (path, f"{len(one)} entries", f"{len(other)} entries")
    # NaN stands for itself in fitted statistics.
    return None if one == other or (one != one and other != other) else (path, _short(one), _short(other))


def _compare(first: Base, other: Base, what: str, describe_it: Any, to_do: str) -> None:
    found = first_difference(describe_it(first), describe_it(other))
    if found is None:
        return
    place, before, after = found
    raise ConfigError(
        f"the runs have different {what}, at {place}\n"
        f"  given: {before} in {first.run.folder}, {after} in {other.run.folder}\n"
        "  allowed: runs of one model, with the same modalities (statistics and vocabularies too) and the same tasks\n"
        f"  to do: {to_do}"
    )


def _model(base: Base) -> Any:
    values = asdict(base.run.config.model)
    for key in _TRAINING:
        del values[key]
    del values["router"]["losses"], values["experts"]["backend"]
    return {"model": _plain(values)}


def _modalities(base: Base) -> Any:
    values = specs_to_dict(base.run.specs)
    for spec in values.values():
        spec["options"] = {key: value for key, value in spec["options"].items() if key not in WHILE_TRAINING}
    return {"modalities": {"in order": list(values), **_plain(values)}}


def _tasks(base: Base) -> Any:
    tasks = describe(base.run.catalogue)["tasks"]
    named = {task["name"]: {key: value for key, value in task.items() if key != "weight"} for task in tasks}
    return {"tasks": {"in order": list(named), **named}}


def _tensors(base: Base) -> Any:
    return {name: list(value.shape) for name, value in sorted(own_weights(base).items())}


def _check_finite(base: Base) -> None:
    for name, value in base.weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CheckpointError(
                f"{base.run.folder}: {name} holds values that are not finite\n"
                "  allowed: runs that trained to finite weights\n  to do: leave this run out"
            )


def _plain(values: Any) -> Any:
    return json.loads(json.dumps(values))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
