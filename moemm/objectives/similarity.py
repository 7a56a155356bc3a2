"""LANISTR's similarity: a sample with hidden tokens should mean what the whole sample means (arXiv:2305.16556).

B samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.nn import functional as F

from moemm.config.schema import SimilarityConfig
from moemm.modalities import TargetShape
from moemm.objectives.content import mean_tokens
from moemm.objectives.registry import Objective, Scene, register_objective, two_layers


@register_objective("similarity")
class Similarity(Objective):
    """1 - cosine between the predicted and the projected view, both ways (SimSiam, arXiv:2011.10566).

    What is predicted is detached, as in both papers: with a gradient on that side all samples would become one point.
    """

    views: ClassVar[tuple[str, ...]] = ("clean", "masked")

    def __init__(self, config: SimilarityConfig, shapes: Mapping[str, TargetShape | None], dim: int):
        super().__init__(config, shapes, dim)
        self.project, self.predict = two_layers(dim, dim), two_layers(dim, dim)

    def forward(self, scene: Scene) -> tuple[torch.Tensor, ...]:
        """Samples of which nothing is hidden do not count: their views are equal."""
        assert scene.hidden_T is not None
        num_samples, sample_T = scene.content.stream.num_samples, scene.content.stream.sample_T
        means = [mean_tokens(scene.x[view], sample_T, num_samples).to(scene.x[view].dtype) for view in self.views]
        both_XD = self.project(torch.cat(means))
        predicted_XD = self.predict(both_XD)
        clean_BD, masked_BD = both_XD.detach().chunk(2)
        cosine_X = F.cosine_similarity(predicted_XD.float(), torch.cat([masked_BD, clean_BD]).float(), dim=-1)
        loss_B = 1.0 - cosine_X.view(2, num_samples).mean(0)
        counts_B = torch.bincount(sample_T[scene.hidden_T], minlength=num_samples) > 0
        return (loss_B * counts_B).sum(), counts_B.sum().float()
