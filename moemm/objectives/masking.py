"""Hiding tokens: which, and by what. T tokens, D width, B samples, M modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from moemm.config.schema import MaskedConfig
from moemm.modalities import TargetShape
from moemm.objectives.content import Content
from moemm.objectives.draws import CROSS, MASK, WHICH, combine, uniform


class Mask(nn.Module):
    """Puts a learned embedding in the place of hidden tokens; place, time and modality are added after it.

    A modality has one embedding for each of its groups (columns, channels): which one is hidden stays known.
    """

    def __init__(self, shapes: Mapping[str, TargetShape | None], config: MaskedConfig, dim: int):
        super().__init__()
        self.config, self.names = config, list(shapes)
        self.embedding = nn.ModuleDict(
            {name: nn.Embedding(1 if shape is None else shape.groups, dim) for name, shape in shapes.items()}
        )
        for table in self.embedding.values():
            nn.init.normal_(table.weight, std=0.2)  # type: ignore[arg-type]
        self.hideable = [name in wanted(config, shapes) for name in shapes]

    def forward(self, content: Content, hidden_T: torch.Tensor) -> torch.Tensor:
        """(T, D) values with the embedding where hidden; every embedding is called, in order, also for no token."""
        rows = [self.embedding[name](content.group_T[span]) for name, span in content.spans.items()]
        values_TD = content.stream.values_TD
        return torch.where(hidden_T[:, None], torch.cat(rows).to(values_TD.dtype), values_TD)

    def hidden(self, content: Content) -> torch.Tensor:
        """(T,) bool: each token with probability `ratio`; in some samples of several modalities, one whole modality."""
        stream, device = content.stream, content.key_T.device
        hideable_M = torch.tensor(self.hideable, device=device)
        hidden_T = uniform(content.key_T, MASK) < self.config.ratio
        if self.config.cross_modal:
            whole_B, which_B = self._whole(content, hideable_M)
            chosen_T = which_B[stream.sample_T] == stream.modality_T
            hidden_T = torch.where(whole_B[stream.sample_T], chosen_T, hidden_T)
        return hidden_T & hideable_M[stream.modality_T]

    def _whole(self, content: Content, hideable_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B,) bool, whether a sample loses one modality as a whole; (B,) which."""
        may_BM = content.present_BM & hideable_M
        several_B = (content.present_BM.sum(1) > 1) & may_BM.any(1)
        whole_B = several_B & (uniform(content.key_B, CROSS) < self.config.cross_modal)
        modality_M = torch.arange(may_BM.shape[1], device=may_BM.device)
        draw_BM = uniform(combine(content.key_B[:, None], modality_M), WHICH)
        return whole_B, torch.where(may_BM, draw_BM, -1.0).argmax(1)


def wanted(config: MaskedConfig, shapes: Mapping[str, TargetShape | None]) -> Sequence[str]:
    """The modalities to hide: those named, or all that can tell what they hold."""
    return config.modalities or [name for name, shape in shapes.items() if shape is not None]
