"""Parts of which each modality, or group of modalities, has its own. T tokens, D width."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from moemm.config.schema import ModelConfig
from moemm.errors import ConfigError

NORM_EPS = 1e-6


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


class OwnNorms(nn.Module):
    """One norm for all tokens but those of some modalities, which have their own. T = 0 included.

    modalities: all, in the order of the stream. own: those with a norm of their own; each is called also with no token.
    """

    def __init__(self, dim: int, modalities: Sequence[str], own: Sequence[str]):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))  # where nn.RMSNorm has it, so that checkpoints of before fit
        self.modalities = tuple(modalities)
        self.own_norms = nn.ModuleDict({name: nn.RMSNorm(dim, eps=NORM_EPS) for name in own})

    def forward(self, x_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """As ByGroup. Neighbours that share a norm go through it together, as they would if there were no others."""
        parts: list[torch.Tensor] = []
        sizes = zip(self.modalities, lengths, strict=True)
        first = 0
        for own, run in itertools.groupby(sizes, lambda pair: pair[0] if pair[0] in self.own_norms else None):
            end = first + sum(length for _, length in run)
            parts.append(self._shared(x_TD[first:end]) if own is None else self.own_norms[own](x_TD[first:end]))
            first = end
        return torch.cat(parts)

    def _shared(self, x_TD: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x_TD, self.weight.shape, self.weight, NORM_EPS)


def tied_or_not(groups: Sequence[str] | None, make: Callable[[], nn.Module]) -> nn.Module:
    """One module for all tokens, or one a group where groups are given."""
    return make() if groups is None else ByGroup(groups, make)


def call(module: nn.Module, x_TD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """A module made by `tied_or_not` on the tokens of a stream."""
    out: torch.Tensor = module(x_TD, lengths) if isinstance(module, ByGroup | OwnNorms) else module(x_TD)
    return out


def norm_maker(config: ModelConfig, modalities: Sequence[str]) -> Callable[[], nn.Module]:
    """What makes the norms of a trunk, as `model.untie` and `model.extensions` ask for."""
    own = [name for extension in config.extensions if extension.norms for name in extension.modalities]
    if own:
        return lambda: OwnNorms(config.dim, modalities, own)
    groups = share_groups(modalities, config.share) if "norms" in config.untie else None
    return lambda: tied_or_not(groups, lambda: nn.RMSNorm(config.dim, eps=NORM_EPS))
