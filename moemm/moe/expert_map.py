"""The one idea that carries the rest: who may use which expert.

A MoE layer owns experts and a boolean matrix `allowed[row, expert]`. A row is a modality, or, where some expert names
tasks, a pair of modality and task. M rows, E experts.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moemm.config.experts import Expert, Role, experts_of_groups
from moemm.config.schema import ExpertGroupConfig, ExtensionConfig
from moemm.errors import ConfigError


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


def _check_names(where: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise ConfigError(f"{where} names {', '.join(unknown)}; this run has {', '.join(known)}")
