"""Masked modelling: tell hidden tokens from the rest of the sample (BERT, arXiv:1810.04805; MAE, arXiv:2111.06377).

T tokens, X values of a token, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from moemm.config.schema import MaskedConfig
from moemm.modalities import Targets, TargetShape
from moemm.objectives.content import mean_over_samples
from moemm.objectives.masking import wanted
from moemm.objectives.registry import Objective, Scene, register_objective, two_layers


@register_objective("masked")
class Masked(Objective):
    """A decoder for each modality; the loss is that of hidden tokens alone, about 1 for who knows nothing."""

    views: ClassVar[tuple[str, ...]] = ("masked",)

    def __init__(self, config: MaskedConfig, shapes: Mapping[str, TargetShape | None], dim: int):
        super().__init__(config, shapes, dim)
        self.shapes = {name: shape for name in wanted(config, shapes) if (shape := shapes[name]) is not None}
        self.decoders = nn.ModuleDict(
            {name: two_layers(dim, shape.values + shape.classes) for name, shape in self.shapes.items()}
        )

    def forward(self, scene: Scene) -> tuple[torch.Tensor, ...]:
        """Decode the hidden tokens of each modality, in order, also where there are none."""
        content, x_TD = scene.content, scene.x["masked"]
        assert scene.hidden_T is not None
        stream, (num_samples, num_modalities) = content.stream, content.present_BM.shape
        losses, cells = [], []
        for name in self.shapes:
            span = content.spans[name]
            index_T = scene.hidden_T[span].nonzero().flatten()
            targets = Targets(*(part[index_T] for part in content.targets[name]))
            loss_T, known_T = token_loss(self.decoders[name](x_TD[span][index_T]), targets, self.shapes[name])
            losses.append(loss_T[known_T])
            cell_T = stream.sample_T[span] * num_modalities + stream.modality_T[span]
            cells.append(cell_T[index_T][known_T])
        return mean_over_samples(torch.cat(losses), torch.cat(cells), (num_samples, num_modalities))


def token_loss(out_TX: torch.Tensor, targets: Targets, shape: TargetShape) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,) loss of each token, fp32, and (T,) bool whether it had something to tell.

    out: (T, X + V). Values: mean squared error over those that are known. Classes: cross entropy over log V, so that
    it is about 1 for who knows nothing, as the error of values of unit variance is.
    """
    value_TX, logit_TV = out_TX.float().split([shape.values, shape.classes], dim=1)
    known_TX = torch.isfinite(targets.values_TX)
    error_TX = torch.where(known_TX, value_TX - targets.values_TX.nan_to_num(0.0, 0.0, 0.0), 0.0).square()
    loss_T = error_TX.sum(1) / known_TX.sum(1).clamp_min(1)
    known_T = known_TX.any(1)
    if shape.classes:
        entropy_T = F.cross_entropy(logit_TV, targets.class_T, ignore_index=-1, reduction="none")
        loss_T = loss_T + entropy_T / math.log(max(shape.classes, 2))
        known_T = known_T | (targets.class_T >= 0)
    return loss_T, known_T
