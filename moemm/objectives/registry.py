"""Objectives without labels by name. To add one: a file here, and its section in ObjectivesConfig; or a file of your
own in `plugins`, whose section is `objectives.own.NAME` (`config` is then an OwnObjectiveConfig).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from moemm.config.entry import load_entry
from moemm.errors import ConfigError
from moemm.modalities import TargetShape
from moemm.models import Views
from moemm.objectives.content import Content


@dataclass(frozen=True, slots=True)
class Scene:
    """What an objective may read: the batch, which tokens were hidden, and what the trunk made of each view.

    aliases: view -> (T, D), once for each of the objective's branches. views: their streams.
    hidden_T: (T,) bool, of the view `masked`; None without it.
    exchanged_T: (T,) bool, of the view `replaced`: which tokens were exchanged; None without it.
    keep_B: (B,) 1 for samples that count for `contrastive`, 0 for those that do not; None: all do.
    judging: whether this pass is for the gradients of the losses alone: nothing is to be counted or remembered.
    """

    content: Content
    views: Views
    aliases: Sequence[Mapping[str, torch.Tensor]]
    hidden_T: torch.Tensor | None
    exchanged_T: torch.Tensor | None
    keep_B: torch.Tensor | None = None
    judging: bool = False

    @property
    def x(self) -> Mapping[str, torch.Tensor]:
        """The first alias: all that an objective with one loss needs."""
        return self.aliases[0]


class Objective(nn.Module, ABC):
    """One objective without labels, with the heads that it needs.

    config: its section of `objectives`; shapes: modality -> what its tokens can tell; see pretext.py for `views`.
    Every rank calls it for every micro-batch; it must then reach all its parameters, also where nothing concerns it.
    """

    views: ClassVar[tuple[str, ...]]
    """The views that it reads: `clean`, `masked`, `alone`, `replaced`."""

    @abstractmethod
    def __init__(self, config: Any, shapes: Mapping[str, TargetShape | None], dim: int):
        super().__init__()

    @abstractmethod
    def forward(self, scene: Scene) -> tuple[torch.Tensor, ...]:
        """(sum of the losses over this rank's samples, number of them), fp32 scalars.

        Summed over ranks it must be the sum over all samples, and so must the gradient.
        """


OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Make an objective known by the name of its section in `objectives`. A name that is taken is an error."""

    def add(objective: type[Objective]) -> type[Objective]:
        known = OBJECTIVES.get(name)
        if known is not None and known is not objective:
            raise ConfigError(f"objective '{name}' is registered by both {known} and {objective}")
        OBJECTIVES[name] = objective
        return objective

    return add


def load_objective(name: str) -> type[Objective]:
    """The objective of this name, an installed package's too (entry point `moemm.objectives`). Raises ConfigError."""
    if name not in OBJECTIVES:
        load_entry("objective", name, OBJECTIVES)  # registers it
    if name not in OBJECTIVES:
        raise ConfigError(
            f"objectives.own.{name}: no objective of this name is registered\n"
            f"  allowed: {', '.join(sorted(OBJECTIVES))}\n"
            "  to do: name the file that registers it in `plugins`"
        )
    return OBJECTIVES[name]


def two_layers(dim: int, out: int) -> nn.Sequential:
    """D -> D -> out with GELU: the heads of the objectives, which are used for training only."""
    return nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, out))
