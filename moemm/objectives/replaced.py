"""Replaced-token detection over every position of every modality (ELECTRA, arXiv:2003.10555).

ELECTRA draws replacements from a small generator, which exists for words. Here tokens change places with tokens of the
same modality (and column or channel) of other samples: each is then as real as the one that it replaces, and only the
rest of the sample, its other modalities included, gives it away. T tokens, D width, R exchanged tokens of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional as F

from moemm.config.schema import ReplacedConfig
from moemm.distributed import gather_rows
from moemm.modalities import TargetShape
from moemm.objectives.content import Content, mean_over_samples
from moemm.objectives.draws import REPLACE, uniform
from moemm.objectives.registry import Objective, Scene, register_objective, two_layers


@register_objective("replaced")
class Replaced(Objective):
    """One head for all modalities: was this token exchanged?"""

    views: ClassVar[tuple[str, ...]] = ("replaced",)

    def __init__(self, config: ReplacedConfig, shapes: Mapping[str, TargetShape | None], dim: int):
        super().__init__(config, shapes, dim)
        self.detect = two_layers(dim, 1)

    def forward(self, scene: Scene) -> tuple[torch.Tensor, ...]:
        """Binary cross entropy of every token."""
        assert scene.exchanged_T is not None
        logit_T = self.detect(scene.x["replaced"])[:, 0].float()
        loss_T = F.binary_cross_entropy_with_logits(logit_T, scene.exchanged_T.float(), reduction="none")
        stream, (num_samples, num_modalities) = scene.content.stream, scene.content.present_BM.shape
        cell_T = stream.sample_T * num_modalities + stream.modality_T
        return mean_over_samples(loss_T, cell_T, (num_samples, num_modalities))


def exchange(content: Content, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, D) values where chosen tokens have each other's, and (T,) bool which tokens have another value now.

    Each group's chosen tokens, of all ranks, stand in the order of their hashes, and each takes the value of the next.
    No gradient goes to the tokens that were taken, which may be another rank's. All ranks call it together.
    """
    values_TD, modality_T = content.stream.values_TD, content.stream.modality_T
    index_n = (uniform(content.key_T, REPLACE) < ratio).nonzero().flatten()
    group_n = modality_T[index_n] * 2**32 + content.group_T[index_n]
    names_R2, first = gather_rows(torch.stack([group_n, content.key_T[index_n]], dim=1))
    values_RD, _ = gather_rows(values_TD[index_n].float())
    next_R = _next_of_group(names_R2[:, 0], names_R2[:, 1])
    taken_nD = values_RD[next_R[first : first + index_n.shape[0]]].to(values_TD.dtype)
    changed_n = (taken_nD != values_TD.detach()[index_n]).any(1)
    changed_T = torch.zeros_like(modality_T, dtype=torch.bool).index_copy(0, index_n, changed_n)
    return values_TD.index_copy(0, index_n, taken_nD), changed_T


def _next_of_group(group_R: torch.Tensor, key_R: torch.Tensor) -> torch.Tensor:
    """(R,) for each row the one that follows it in its group, by key; after the last comes the first."""
    by_key = torch.argsort(key_R, stable=True)
    order_R = by_key[torch.argsort(group_R[by_key], stable=True)]
    sorted_R = group_R[order_R]
    place_R = torch.arange(group_R.shape[0], device=group_R.device)
    begins_R = torch.ones_like(place_R, dtype=torch.bool)
    begins_R[1:] = sorted_R[1:] != sorted_R[:-1]
    ends_R = begins_R.roll(-1)
    first_R = place_R[begins_R][begins_R.long().cumsum(0) - 1]
    after_R = torch.where(ends_R, first_R, place_R + 1)
    next_R = torch.empty_like(order_R)
    next_R[order_R] = order_R[after_R]
    return next_R
