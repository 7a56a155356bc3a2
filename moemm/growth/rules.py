"""Rules that make the weights of one model from those of another: pattern -> target, transform.

A name is cut at its dots. `{i}` in a pattern stands for one part of a name, `{rest*}` for one or more. In a target a
placeholder has the value that it has in the source; one that the source lacks stands for every value that the target's
names allow, so that one tensor goes to many. Every name on both sides has to be covered: the first rule whose source
matches takes a name, and a name that no rule takes, makes or excuses is an error.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moemm.config.suggest import did_you_mean
from moemm.errors import CheckpointError

Transform = Callable[[Sequence[torch.Tensor], torch.Tensor], torch.Tensor]
"""The sources of one target, and the target's fresh value (for its shape, or parts that are kept) -> its new value."""
Tensors = Mapping[str, torch.Tensor]
Values = Mapping[str, str]
_HOLE = re.compile(r"\{([a-z_]+)(\*?)\}")
_SHOWN = 8


def as_it_is(sources: Sequence[torch.Tensor], fresh: torch.Tensor) -> torch.Tensor:
    """The one source, unchanged."""
    del fresh
    (source,) = sources
    return source


@dataclass(frozen=True, slots=True)
class To:
    """One target of a rule, and how its value is made."""

    pattern: str
    transform: Transform = as_it_is


@dataclass(frozen=True, slots=True)
class Rule:
    """sources -> targets. Without targets: they are left out; without sources: the targets stay as they were drawn.

    sources: patterns that are brought together, one name of each for every value of their placeholders. reason: why
    something is left out or drawn; required there, and shown in the receipt.
    """

    sources: tuple[str, ...] = ()
    targets: tuple[To, ...] = ()
    reason: str = ""

    @property
    def title(self) -> str:
        """As errors name it."""
        return f"{', '.join(self.sources) or '(drawn)'} -> {', '.join(t.pattern for t in self.targets) or '(left out)'}"


@dataclass(slots=True)
class Taken:
    """What a set of rules did. dropped, fresh: reason -> names. made: the names of the tensors that were made."""

    made: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    fresh: dict[str, list[str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For the user."""
        found = [f"{len(self.made)} tensors made from those of the source"]
        found += [f"left out, {reason}: {some(names)}" for reason, names in self.dropped.items()]
        return found + [f"drawn anew, {reason}: {some(names)}" for reason, names in self.fresh.items()]


def apply_rules(rules: Sequence[Rule], source: Tensors, target: Tensors) -> tuple[dict[str, torch.Tensor], Taken]:
    """The new values of every tensor of `target`, from `source` and what `target` holds, and what was done.

    Raises CheckpointError that lists what no rule covers on either side, what two rules make, sources that lack their
    partners, and shapes and values that do not fit.
    """
    problems: list[str] = []
    taken = Taken()
    owners = {name: owner for name in source if (owner := _owner(rules, name)) is not None}
    found: dict[str, torch.Tensor] = {}
    for number, rule in enumerate(rules):
        mine = [name for name, owner in owners.items() if owner == number]
        if not rule.targets and mine:
            taken.dropped.setdefault(rule.reason, []).extend(mine)
        if not rule.sources or not rule.targets:
            continue
        if not mine:
            problems.append(f"the rule {rule.title} matches nothing")
        for values, names in _gathered(rule, mine, problems):
            for key, value in _made(rule, values, [source[name] for name in names], target, problems):
                if key in found:
                    problems.append(f"{key} is made twice, the second time by {rule.title}")
                found[key] = value
    _excuse(rules, target, found, taken)
    problems += _uncovered([name for name in source if name not in owners], "source", target)
    problems += _uncovered([name for name in target if name not in found], "target", source)
    if problems:
        raise CheckpointError("the rules do not fit:\n  " + "\n  ".join(problems))
    return found, taken


def match(pattern: str, name: str) -> dict[str, str] | None:
    """The values of the placeholders with which `pattern` is `name`; None where it is not."""
    if "{" not in pattern:
        return {} if pattern == name else None
    found = _expression(pattern).fullmatch(name)
    return None if found is None else found.groupdict()


def some(names: Sequence[str]) -> str:
    """Modules for tensors, numbers of blocks and experts as one: `trunk.blocks.*.ffn.w1_FD and 12 more`."""
    known = Counter(re.sub(r"(?<=[._])\d+(?=\.|$)", "*", name) for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in known.items()]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _owner(rules: Sequence[Rule], name: str) -> int | None:
    owners = (n for n, rule in enumerate(rules) if any(match(pattern, name) is not None for pattern in rule.sources))
    return next(owners, None)


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    """A regular expression; a placeholder that stands twice has the same value both times."""
    parts, seen, end = [], set[str](), 0
    for hole in _HOLE.finditer(pattern):
        name, many = hole.groups()
        parts.append(re.escape(pattern[end : hole.start()]))
        parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>{'.+' if many else '[^.]+'})")
        seen.add(name)
        end = hole.end()
    return re.compile("".join([*parts, re.escape(pattern[end:])]))


def _filled(pattern: str, values: Values) -> str:
    """The pattern with the values that are known."""
    return _HOLE.sub(lambda hole: values.get(hole[1], hole[0]), pattern)


def _gathered(rule: Rule, names: Iterable[str], problems: list[str]) -> Iterator[tuple[Values, list[str]]]:
    """For each value of the placeholders, the names that belong together, in the order of the rule's sources."""
    groups: dict[tuple[tuple[str, str], ...], dict[int, str]] = {}
    for name in names:
        for place, pattern in enumerate(rule.sources):
            values = match(pattern, name)
            if values is not None:
                groups.setdefault(tuple(sorted(values.items())), {})[place] = name
                break
    for key, members in groups.items():
        lacking = [pattern for place, pattern in enumerate(rule.sources) if place not in members]
        if lacking:
            there = ", ".join(members.values())
            problems.append(f"{there} needs {', '.join(_filled(one, dict(key)) for one in lacking)} beside it")
        else:
            yield dict(key), [members[place] for place in range(len(rule.sources))]


def _made(
    rule: Rule, values: Values, sources: Sequence[torch.Tensor], target: Tensors, problems: list[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) of the targets that a rule makes from one group of sources."""
    for to in rule.targets:
        wanted = _filled(to.pattern, values)
        keys = [wanted] if wanted in target else [key for key in target if match(wanted, key) is not None]
        if not keys:
            problems.append(f"{rule.title}: the target has no {wanted}{did_you_mean(wanted, target)}")
        for key in keys:
            try:
                value = to.transform(sources, target[key]).to(target[key].dtype)
            except (RuntimeError, ValueError, IndexError) as error:
                value = target[key]
                problems.append(f"{rule.title}: {key}: {error}")
            if value.shape != target[key].shape:
                problems.append(f"{key} is {_shape(target[key])}, and what {rule.title} makes is {_shape(value)}")
            elif not torch.isfinite(value).all():
                problems.append(f"{key} would hold values that are not finite: {', '.join(rule.sources)}")
            yield key, value.clone()


def _excuse(rules: Sequence[Rule], target: Tensors, found: dict[str, torch.Tensor], taken: Taken) -> None:
    """Add what is to stay as it was drawn."""
    taken.made = list(found)
    for rule in rules:
        if rule.sources:
            continue
        for name in target:
            if name not in found and any(match(to.pattern, name) is not None for to in rule.targets):
                found[name] = target[name].clone()
                taken.fresh.setdefault(rule.reason, []).append(name)


def _uncovered(names: Sequence[str], side: str, others: Iterable[str]) -> Iterator[str]:
    others = list(others)
    for name in names[:_SHOWN]:
        yield f"{name} of the {side} is covered by no rule{did_you_mean(name, others)}"
    if len(names) > _SHOWN:
        yield f"and {len(names) - _SHOWN} more of the {side}"


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "one number"
