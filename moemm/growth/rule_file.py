"""Rule files: YAML that says how a foreign model's weights become those of a dense moemm model. No code in it.

strip: [vit.]                         # taken off the names of the source, where they begin with it
rules:
  - {from: "encoder.layer.{i}.output.dense.weight", to: "trunk.blocks.{i}.ffn.w2_DF", steps: [transpose]}
  - {drop: "pooler.{rest*}", why: the heads pool}
  - {fresh: "heads.{rest*}", why: the tasks are others}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moemm.config.suggest import did_you_mean
from moemm.config.yaml_source import read_yaml
from moemm.errors import ConfigError
from moemm.growth.rules import Rule, To, Transform

Parts = list[torch.Tensor]
Step = Callable[[Parts, torch.Tensor], Parts]
_KEYS = {"from": {"from", "to", "steps"}, "drop": {"drop", "why"}, "fresh": {"fresh", "why"}}


@dataclass(frozen=True, slots=True)
class RuleFile:
    """The rules, and what is taken off the beginning of the source's names."""

    rules: tuple[Rule, ...]
    strip: tuple[str, ...] = ()

    def named(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by the names that the rules are about."""
        found = {}
        for name, tensor in tensors.items():
            prefix = next((one for one in self.strip if name.startswith(one)), "")
            found[name.removeprefix(prefix)] = tensor
        return found


def read_rules(path: Path) -> RuleFile:
    """Read and check a rule file. Raises ConfigError that says which rule is wrong, and how rules are written."""
    source = read_yaml(path)
    if source.problems:
        raise ConfigError(f"{path}: " + "; ".join(problem.message for problem in source.problems))
    values = source.values
    unknown = set(values) - {"rules", "strip"}
    rules, strip = values.get("rules"), values.get("strip", [])
    if unknown or not isinstance(rules, list) or not rules or not _texts(strip):
        raise ConfigError(f"{path}: must hold `rules`, a list, and may hold `strip`, a list of texts; {_HELP}")
    return RuleFile(tuple(_rule(entry, f"{path}: rules.{number}") for number, entry in enumerate(rules)), tuple(strip))


_HELP = (
    "a rule is {from: NAME or [NAMES], to: NAME or [NAMES], steps: [...]}, {drop: NAME, why: TEXT} or {fresh: NAME, "
    "why: TEXT}"
)


def _rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: {_HELP}")
    kind = next((kind for kind in _KEYS if kind in entry), None)
    if kind is None or set(entry) - _KEYS[kind]:
        raise ConfigError(f"{where}: has the keys {', '.join(entry)}; {_HELP}")
    patterns = _names(entry[kind], f"{where}.{kind}")
    if kind != "from":
        reason = entry.get("why")
        if not isinstance(reason, str) or not reason:
            raise ConfigError(f"{where}: `{kind}` needs `why`, a reason for the receipt")
        return Rule(patterns, (), reason) if kind == "drop" else Rule((), tuple(To(one) for one in patterns), reason)
    steps = [_step(one, f"{where}.steps") for one in entry.get("steps", [])]
    targets = _names(entry.get("to"), f"{where}.to")
    return Rule(patterns, tuple(To(one, _in_order(steps)) for one in targets))


def _names(given: Any, where: str) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not _texts(names) or not names:
        raise ConfigError(f"{where}: must be a name with placeholders like {{i}}, or a list of them; {_HELP}")
    return tuple(names)


def _texts(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(one, str) and one for one in given)


def _in_order(steps: Sequence[Step]) -> Transform:
    def transform(sources: Sequence[torch.Tensor], fresh: torch.Tensor) -> torch.Tensor:
        parts = list(sources)
        for step in steps:
            parts = step(parts, fresh)
        if len(parts) != 1:
            raise ValueError(f"{len(parts)} tensors are left for one target; `concat` joins them")
        return parts[0]

    return transform


def _step(given: Any, where: str) -> Step:
    name, value = (given, None) if isinstance(given, str) else (None, None)
    if isinstance(given, dict) and len(given) == 1:
        ((name, value),) = given.items()
    if name not in _STEPS:
        known = ", ".join(_STEPS)
        raise ConfigError(f"{where}: {given!r} is no step{did_you_mean(str(name), _STEPS)}; allowed: {known}")
    try:
        return _STEPS[name](value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {name}: {error}") from error


def _each(change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Step:
    return lambda parts, fresh: [change(part, fresh) for part in parts]


def _concat(value: Any) -> Step:
    dim = 0 if value is None else _whole(value)
    return lambda parts, fresh: [torch.cat(parts, dim)]


def _transpose(value: Any) -> Step:
    if value is not None:
        raise ValueError("takes no value; permute does")
    return _each(lambda part, fresh: part.T)


def _permute(value: Any) -> Step:
    order = [_whole(one) for one in value]
    return _each(lambda part, fresh: part.permute(order))


def _reshape(value: Any) -> Step:
    if value is not None:
        raise ValueError("takes no value: the shape is that of the target")
    return _each(lambda part, fresh: part.reshape(fresh.shape))


def _scale(value: Any) -> Step:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("needs a number")
    return _each(lambda part, fresh: part * float(value))


def _rows(value: Any) -> Step:
    first, last = (_whole(one) for one in value)
    return _each(lambda part, fresh: part[first:last])


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


_STEPS: dict[str, Callable[[Any], Step]] = {
    "concat": _concat,
    "transpose": _transpose,
    "permute": _permute,
    "reshape": _reshape,
    "scale": _scale,
    "rows": _rows,
}
"""`concat` (along 0 or a dimension), `transpose`, `permute: [1, 0, 2]`, `reshape` to the target's shape, `scale: 0.5`,
`rows: [first, last]`."""
