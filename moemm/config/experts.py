"""From `model.experts.groups` to experts with names. Imports no torch: plans count experts too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from moemm.config.layers import parse_layers
from moemm.config.schema import ExpertGroupConfig, RouterConfig

Kind = Literal["shared", "modality", "routed", "zero", "lora"]
Role = Literal["shared", "hard", "routed"]

TAKE_ALL = {"hard", "top_p"}
"""Kinds of router for which no top_k means every allowed expert."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One expert.

    id: its name in checkpoints; never reused, so that experts can be added later without renaming.
    kind: `shared` runs on every token, `modality` on every token that it serves, `routed` where the router sends;
        `zero` is routed and computes nothing; `lora` is `base` plus a low-rank change of its weights: routed, or run on
        every token that it serves where it names modalities or tasks.
    width: hidden units; 0 for zero and lora experts.
    modalities, tasks: who may use it; None means all, also those added later.
    layers: where it stands; None means in all.
    base, rank: of a lora expert.
    added: number of the extension that it came with; 0: it was there from the beginning.
    """

    id: str
    kind: Kind
    width: int = 0
    modalities: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    base: str | None = None
    rank: int = 0
    added: int = 0

    @property
    def role(self) -> Role:
        """How tokens come to it: all of them, all that it serves ("hard"), or those that the router sends."""
        if self.kind == "lora":
            return "routed" if self.modalities is None and self.tasks is None else "hard"
        return "shared" if self.kind == "shared" else "hard" if self.kind == "modality" else "routed"

    def serves(self, modality: str, task: str | None = None) -> bool:
        """Whether tokens of `modality`, in samples of `task`, may use this expert."""
        named = self.modalities is None or modality in self.modalities
        return named and (self.tasks is None or task is None or task in self.tasks)


def experts_of_groups(
    groups: Sequence[ExpertGroupConfig], modalities: Sequence[str], layers: int
) -> list[list[Expert]]:
    """The experts of each group, named, in the order of the map."""
    number_of: dict[str, Iterator[int]] = {}
    found = []
    for group in groups:
        made = list(_of_group(group, groups, modalities, layers))
        found.append([replace(e, id=_id(e, group, len(made), i, number_of)) for i, e in enumerate(made)])
    return found


def _of_group(
    group: ExpertGroupConfig, groups: Sequence[ExpertGroupConfig], modalities: Sequence[str], layers: int
) -> Iterator[Expert]:
    """The experts of one group; their ids are still without numbers."""
    named = {name for other in groups if other.kind == "modality" for name in other.modalities or ()}
    one_each = [(name,) for name in modalities if name not in named]
    if group.kind == "modality" and group.modalities is None and group.tasks is None:
        served: list[tuple[str, ...] | None] = [*one_each]
    elif group.per_modality:
        served = [(name,) for name in group.modalities or modalities]
    else:
        served = [None if group.modalities is None else tuple(group.modalities)]
    tasks = None if group.tasks is None else tuple(group.tasks)
    where = parse_layers(group.layers, layers)
    for names, _ in itertools.product(served, range(group.count)):
        yield Expert(
            id="_".join([group.kind, *(names or ()), *(tasks or ())]),
            kind=group.kind,
            width=group.width or 0,
            modalities=names,
            tasks=tasks,
            layers=None if len(where) == layers else where,
            base=group.base,
            rank=group.rank or 0,
            added=group.added,
        )


def _id(expert: Expert, group: ExpertGroupConfig, size: int, place: int, number_of: dict[str, Iterator[int]]) -> str:
    """routed_0, routed_1 ..., counted over all groups; shared and modality experts that come first have no number."""
    if group.id is not None:
        return group.id if size == 1 else f"{group.id}_{place}"
    number = next(number_of.setdefault(expert.id, itertools.count()))
    return expert.id if number == 0 and expert.kind in ("shared", "modality") else f"{expert.id}_{number}"


def active_experts(config: RouterConfig) -> int | None:
    """Routed experts that a token uses at most; None: all that it may."""
    return config.top_k if config.kind in TAKE_ALL else config.top_k or 1
