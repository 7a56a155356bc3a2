"""The one idea that carries the rest: which modality may use which expert.

A MoE layer owns experts and a boolean matrix `allowed[modality, expert]`. M modalities, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moemm.config.schema import ExpertsConfig
from moemm.errors import ConfigError

Kind = Literal["shared", "modality", "routed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """One expert of a layer.

    id: its name in checkpoints; never reused, so that experts can be added later without renaming.
    kind: `shared` runs on every token, `modality` on every token of its modalities, `routed` where the router sends.
    width: hidden units.
    modalities: who may use it; None means all, also modalities added later.
    """

    id: str
    kind: Kind
    width: int
    modalities: tuple[str, ...] | None = None

    def serves(self, modality: str) -> bool:
        """Whether tokens of `modality` may use this expert."""
        return self.modalities is None or modality in self.modalities


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Experts and modalities of a layer, both in a fixed order."""

    experts: tuple[Expert, ...]
    modalities: tuple[str, ...]

    @classmethod
    def from_config(cls, config: ExpertsConfig, modalities: Sequence[str]) -> ExpertMap:
        """The map that `model.experts` describes: shared + one a modality or group + routed.

        Raises ConfigError where a group names a modality that the run does not have.
        """
        experts = [Expert(id="shared", kind="shared", width=config.shared_width)] if config.shared_width else []
        if config.modality_width:
            for name, members in _groups(config.groups, modalities):
                experts.append(Expert(id=name, kind="modality", width=config.modality_width, modalities=members))
        for number in range(config.routed):
            experts.append(Expert(id=f"routed_{number}", kind="routed", width=config.routed_width))
        return cls(tuple(experts), tuple(modalities))

    def of_kind(self, kind: Kind) -> tuple[Expert, ...]:
        """The experts of one kind, in order."""
        return tuple(expert for expert in self.experts if expert.kind == kind)

    def allowed(self, kind: Kind) -> torch.Tensor:
        """(M, experts of that kind) bool: who may use what."""
        rows = [[expert.serves(name) for expert in self.of_kind(kind)] for name in self.modalities]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(self.modalities), -1)

    def to_dict(self) -> dict[str, Any]:
        """The map as plain data, for manifests."""
        experts = [{"id": e.id, "kind": e.kind, "width": e.width, "modalities": e.modalities} for e in self.experts]
        return {"modalities": list(self.modalities), "experts": experts}


def _groups(groups: Sequence[Sequence[str]], modalities: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """(expert id, members) in the order of the modalities; a modality in no group is a group of its own."""
    unknown = sorted({name for group in groups for name in group} - set(modalities))
    if unknown:
        raise ConfigError(
            f"model.experts.groups names {', '.join(unknown)}; the modalities of this run are {', '.join(modalities)}"
        )
    owner = {name: tuple(group) for group in groups for name in group}
    found: dict[str, tuple[str, ...]] = {}
    for name in modalities:
        members = owner.get(name, (name,))
        found.setdefault("modality_" + "_".join(members), members)
    return list(found.items())
