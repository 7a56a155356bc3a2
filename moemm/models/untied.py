"""Parts of which each modality, or group of modalities, has its own. T tokens, D width."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moemm.errors import ConfigError


def share_groups(modalities: Sequence[str], share: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Name of each modality's group: its members joined by _, or its own name.

    Raises ConfigError where `model.share` names a modality that the run does not have.
    """
    unknown = sorted({name for group in share for name in group} - set(modalities))
    if unknown:
        raise ConfigError(f"model.share names {', '.join(unknown)}; this run has {', '.join(modalities)}")
    owner = {name: "_".join(group) for group in share for name in group}
    return tuple(owner.get(name, name) for name in modalities)


class ByGroup(nn.Module):
    """One module a group. Every one is called for every modality, with zero tokens where there are none."""

    def __init__(self, groups: Sequence[str], make: Callable[[], nn.Module]):
        super().__init__()
        self.groups = tuple(groups)
        self.members = nn.ModuleDict({name: make() for name in dict.fromkeys(groups)})

    def forward(self, x_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """x_TD (T, D), the tokens of each modality together; lengths: their numbers, in the order of `groups`."""
        parts = zip(self.groups, x_TD.split(list(lengths)), strict=True)
        return torch.cat([self.members[name](part) for name, part in parts])


def tied_or_not(groups: Sequence[str] | None, make: Callable[[], nn.Module]) -> nn.Module:
    """One module for all tokens, or one a group where groups are given."""
    return make() if groups is None else ByGroup(groups, make)


def call(module: nn.Module, x_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """A module made by `tied_or_not` on the tokens of a stream."""
    out: torch.Tensor = module(x_TD, lengths) if isinstance(module, ByGroup) else module(x_TD)
    return out
