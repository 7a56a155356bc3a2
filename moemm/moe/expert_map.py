"""The one idea that carries the rest: who may use which expert.

A MoE layer owns experts and a boolean matrix `allowed[row, expert]`. A row is a modality, or, where some expert names
tasks, a pair of modality and task. M rows, E experts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from moemm.config.layers import parse_layers
from moemm.config.schema import ExpertGroupConfig, ExtensionConfig
from moemm.errors import ConfigError

Kind = Literal["shared", "modality", "routed", "zero", "lora"]
Role = Literal["shared", "hard", "routed"]


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


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Experts and modalities in a fixed order; tasks where some expert names tasks, else none.

    came: modality -> number of the extension that it came with; those that are not there were there from the beginning.
    Raises ConfigError for an id that stands twice, a lora expert without its base, and a row that some layer leaves
    without any expert.
    """

    experts: tuple[Expert, ...]
    modalities: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    num_layers: int = 1
    came: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(expert.id for expert in self.experts).items() if count > 1]
        if twice:
            raise ConfigError(f"model.experts.groups: the id {twice[0]} stands twice; ids name checkpoint entries")
        for layer in range(self.num_layers):
            self._check_layer(layer)

    @classmethod
    def from_config(
        cls,
        groups: Sequence[ExpertGroupConfig],
        modalities: Sequence[str],
        tasks: Sequence[str] = (),
        layers: int = 1,
        extensions: Sequence[ExtensionConfig] = (),
    ) -> ExpertMap:
        """The map that `model.experts.groups` and `model.extensions` describe, for a trunk of `layers` layers.

        Raises ConfigError where a group names a modality or task that the run does not have, and as the class does.
        """
        for number, group in enumerate(groups):
            _check_names(f"model.experts.groups.{number}.modalities", group.modalities, modalities)
            _check_names(f"model.experts.groups.{number}.tasks", group.tasks, tasks)
        experts = [expert for made in experts_of_groups(groups, modalities, layers) for expert in made]
        skills = tuple(tasks) if any(expert.tasks is not None for expert in experts) else ()
        came = {name: number for number, one in enumerate(extensions, 1) for name in one.modalities}
        return cls(tuple(experts), tuple(modalities), skills, layers, came)

    @property
    def rows(self) -> tuple[tuple[str, str | None], ...]:
        """(modality, task or None) of each row of `allowed`."""
        return tuple(itertools.product(self.modalities, self.tasks or (None,)))

    def row(self, modality_T: torch.Tensor, task_T: torch.Tensor) -> torch.Tensor:
        """(T,) int64 row of each token, from its modality and the task of its sample, both (T,) int64."""
        return modality_T * len(self.tasks) + task_T if self.tasks else modality_T

    def at_layer(self, layer: int) -> ExpertMap:
        """The map with the experts of one layer alone."""
        here = tuple(e for e in self.experts if e.layers is None or layer in e.layers)
        return ExpertMap(tuple(replace(e, layers=None) for e in here), self.modalities, self.tasks, came=self.came)

    def of_role(self, role: Role) -> tuple[Expert, ...]:
        """The experts that tokens come to in one way, in order."""
        return tuple(expert for expert in self.experts if expert.role == role)

    def allowed(self, role: Role) -> torch.Tensor:
        """(M, experts of that role) bool: who may use what."""
        rows = [[expert.serves(*row) for expert in self.of_role(role)] for row in self.rows]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(self.rows), -1)

    def active(self, row: tuple[str, str | None], size: Callable[[Expert], int], *, top_k: int | None) -> int:
        """Sum of `size` over the experts that a token of `row` passes through in a layer, the largest that may be.

        top_k: routed experts a token uses; None: all that it may use.
        """
        serving = [expert for expert in self.experts if expert.serves(*row)]
        routed = sorted((size(expert) for expert in serving if expert.role == "routed"), reverse=True)
        return sum(size(expert) for expert in serving if expert.role != "routed") + sum(routed[:top_k])

    def to_dict(self) -> dict[str, Any]:
        """The map as plain data, for manifests; what is not set is left out."""
        experts = [
            {key: getattr(e, key) for key in Expert.__dataclass_fields__ if getattr(e, key) or key == "id"}
            for e in self.experts
        ]
        return {"modalities": list(self.modalities), "tasks": list(self.tasks), "experts": experts}

    def _check_layer(self, layer: int) -> None:
        here = {e.id: e for e in self.experts if e.layers is None or layer in e.layers}
        for expert in here.values():
            base = here.get(expert.base or "")
            if expert.kind == "lora" and (base is None or not base.width):
                raise ConfigError(
                    f"model.experts.groups: the lora expert {expert.id} has base {expert.base}, which is no expert "
                    f"with weights in layer {layer}; there: {', '.join(e.id for e in here.values() if e.width)}"
                )
        for modality, task in self.rows:
            if not any(expert.serves(modality, task) for expert in here.values()):
                who = modality if task is None else f"{modality} in task {task}"
                raise ConfigError(
                    f"model.experts.groups: {who} reaches no expert in layer {layer}; add one that serves it there, "
                    "or a group of kind shared"
                )


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


def _check_names(where: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise ConfigError(f"{where} names {', '.join(unknown)}; this run has {', '.join(known)}")
