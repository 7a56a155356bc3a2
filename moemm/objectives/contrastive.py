"""Contrastive alignment: the modalities of a sample, each encoded alone, find each other among all ranks' samples.

They are encoded alone because attention inside a sample would show each modality the other: nothing would be left to
find. B samples of this rank, N of all ranks, M modalities, D width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from moemm.config.schema import ContrastiveConfig
from moemm.distributed import gather_rows, num_ranks
from moemm.modalities import TargetShape
from moemm.objectives.content import mean_tokens
from moemm.objectives.noise import PairNoise
from moemm.objectives.registry import Objective, Scene, register_objective

MAX_SCALE = 100.0


class PairLoss(nn.Module):
    """(n, n) cosines -> (n,) loss of each sample, the mean of both directions; temperature and bias are learned.

    `mil_nce` is the symmetric form that VATT trains with (arXiv:2104.11178): each direction has a denominator of its
    own, so that bags of one sample are infonce.
    """

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.kind = config.loss
        self.scale = nn.Parameter(torch.tensor([-math.log(config.temperature)]))
        # Few positives among many negatives: without this bias the first steps would only learn to say no.
        self.bias = nn.Parameter(torch.tensor([-10.0])) if self.kind == "siglip" else None

    def forward(
        self, cosines: Sequence[torch.Tensor], same: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """One (n,) for each (n, n) of a pair of modalities; and 0 with a gradient to the parameters, in any case.

        same: (n, n) bool for each: whether two samples are of one bag; without mil_nce each sample is its own.
        """
        scale = self.scale.float().exp().clamp_max(MAX_SCALE)
        if self.kind == "mil_nce":
            found = [_mil_nce(scale * cosine_nn, same_nn) for cosine_nn, same_nn in zip(cosines, same, strict=True)]
            return found, 0.0 * scale.sum()
        if self.bias is None:
            return [_infonce(scale * cosine_nn) for cosine_nn in cosines], 0.0 * scale.sum()
        losses = [_siglip(scale * cosine_nn + self.bias.float()) for cosine_nn in cosines]
        return losses, 0.0 * (scale + self.bias.float()).sum()


class Everyone(NamedTuple):
    """Of the N samples of all ranks: task, place in its file, whether they count, bag, and (N, M) bool what they have.
    """  # fmt: skip

    task_N: torch.Tensor
    index_N: torch.Tensor
    keep_N: torch.Tensor
    bag_N: torch.Tensor
    present_NM: torch.Tensor


class Found(NamedTuple):
    """Of N samples and P pairs: losses; bool whether the sample has the pair, and something to be told apart from.

    told_NP: losses of which none is small only because the bag is large. reach: 0 with a gradient to all parameters.
    """

    loss_NP: torch.Tensor
    has_NP: torch.Tensor
    told_NP: torch.Tensor
    reach: torch.Tensor


@register_objective("contrastive")
class Contrastive(Objective):
    """InfoNCE, SigLIP or MIL-NCE between the pairs of modalities of a sample, whose loss is the mean over its pairs."""

    views: ClassVar[tuple[str, ...]] = ("alone",)

    def __init__(self, config: ContrastiveConfig, shapes: Mapping[str, TargetShape | None], dim: int):
        super().__init__(config, shapes, dim)
        names = list(shapes)
        self.project = nn.ModuleDict({name: nn.Linear(dim, dim) for name in names})
        self.pairs = pairs_of(config, names)
        self.pair_loss = PairLoss(config)
        self.noise: PairNoise | None = None
        """Which pairs look wrong, where that is asked for; set after building."""

    def forward(self, scene: Scene) -> tuple[torch.Tensor, ...]:
        """Every rank computes the loss of all samples, and takes an even share of it; the gradient is that of its own.

        The share's gradient is scaled back up, so that the sum over ranks is the gradient of the global loss.
        """
        present_BM = scene.content.present_BM
        own = [self._encode(scene, x["alone"]) for x in scene.aliases]
        everyone_NMD, first = gather_rows(own[0].detach())
        known = _everyone(scene)
        ranks, place_B = num_ranks(), torch.arange(first, first + len(present_BM), device=present_BM.device)
        shares = [one.detach() + ranks * (one - one.detach()) for one in own]
        # Where the pairs' gradients are to be told apart, each pair of a sample reads an alias of its own.
        share_QBMD = torch.stack(shares)
        alias_BP = pair_numbers(present_BM, self.pairs).clamp(0, len(shares) - 1)

        def rows(pair: int) -> torch.Tensor:
            own_BMD = (
                shares[0]
                if len(shares) == 1
                else share_QBMD[alias_BP[:, pair], torch.arange(len(place_B), device=place_B.device)]
            )
            return everyone_NMD.index_copy(0, place_B, own_BMD)

        found = self._over_pairs(rows, known)
        weight_NP = found.has_NP * known.keep_N[:, None]
        if self.noise is not None:
            row_N = self.noise.rows(known.task_N, known.index_N)
            if not scene.judging:
                self.noise.see(row_N, found.told_NP.masked_fill(~found.has_NP, torch.nan))
            weight_NP = weight_NP * self.noise.weights(row_N)
        weight_NP = weight_NP / found.has_NP.sum(1, keepdim=True).clamp_min(1)
        loss, count = (found.loss_NP * weight_NP).sum() + found.reach, weight_NP.sum()
        return loss / ranks + 0.0 * torch.stack(own).sum(), count / ranks

    def _encode(self, scene: Scene, x_TD: torch.Tensor) -> torch.Tensor:
        """(B, M, D) fp32 the direction of each modality of each sample; zeros where it is absent."""
        num_samples, num_modalities = scene.content.present_BM.shape
        mean_CD = mean_tokens(x_TD, scene.views.parts["alone"].sample_T, num_samples * num_modalities)
        mean_BMD = mean_CD.view(num_samples, num_modalities, -1).to(x_TD.dtype)
        parts = [
            F.normalize(layer(mean_BMD[:, number]).float(), dim=-1)
            for number, layer in enumerate(self.project.values())
        ]
        return torch.stack(parts, dim=1)

    def _over_pairs(self, encoded: Callable[[int], torch.Tensor], known: Everyone) -> Found:
        """The losses of the pairs of all samples. encoded: number of a pair -> (N, M, D)."""
        rows, cosines, same, numbers = [], [], [], []
        present_NM = known.present_NM
        together_MM = (present_NM.float().T @ present_NM.float()).tolist()
        for number, (a, b) in enumerate(self.pairs):
            if together_MM[a][b] > 1:  # alone, a sample has nothing to be told apart from; all ranks see the same here
                row_n, z_NMD = (present_NM[:, a] & present_NM[:, b]).nonzero().flatten(), encoded(number)
                rows.append(row_n)
                numbers.append(number)
                cosines.append(z_NMD[row_n, a] @ z_NMD[row_n, b].T)
                bag_n = known.bag_N[row_n] if self.pair_loss.kind == "mil_nce" else row_n
                same.append(bag_n[:, None] == bag_n)
        losses, reach = self.pair_loss(cosines, same)
        losses_NP = present_NM.new_zeros(present_NM.shape[0], len(self.pairs), dtype=torch.float32)
        told_NP, has_NP = torch.zeros_like(losses_NP), torch.zeros_like(losses_NP, dtype=torch.bool)
        for number, row_n, loss_n, same_nn in zip(numbers, rows, losses, same, strict=True):
            losses_NP = losses_NP.index_put((row_n, row_n.new_tensor(number)), loss_n)
            has_NP[row_n, number] = ~same_nn.all(1)
            told_NP[row_n, number] = loss_n.detach() * _above_chance(same_nn)
        return Found(losses_NP, has_NP, told_NP, reach)


def _everyone(scene: Scene) -> Everyone:
    """Gathered from all ranks."""
    content = scene.content
    keep_B = torch.ones_like(content.index_B) if scene.keep_B is None else scene.keep_B.long()
    own_BX = torch.stack([content.stream.task_B, content.index_B, keep_B, content.bag_B], dim=1)
    rows_NX, _ = gather_rows(torch.cat([own_BX, content.present_BM.long()], dim=1))
    task_N, index_N, keep_N, bag_N = rows_NX[:, :4].unbind(1)
    return Everyone(task_N, index_N, keep_N, bag_N, rows_NX[:, 4:].bool())


def pair_numbers(present_BM: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(B, P) int64: the how many-eth of its sample's pairs each pair is; -1 where the sample lacks it."""
    both_BP = torch.stack([present_BM[:, a] & present_BM[:, b] for a, b in pairs], dim=1)
    return torch.where(both_BP, both_BP.cumsum(1) - 1, -1)


def pairs_of(config: ContrastiveConfig, names: list[str]) -> list[tuple[int, int]]:
    """Numbers of the modalities of each pair: those of the config, or all."""
    if config.pairs is None:
        return list(itertools.combinations(range(len(names)), 2))
    return [(names.index(a), names.index(b)) for a, b in config.pairs]


def _infonce(logit_nn: torch.Tensor) -> torch.Tensor:
    """-log softmax of the own partner, over rows and over columns."""
    own_n = logit_nn.diagonal()
    return 0.5 * (logit_nn.logsumexp(1) + logit_nn.logsumexp(0)) - own_n


def _mil_nce(logit_nn: torch.Tensor, same_nn: torch.Tensor) -> torch.Tensor:
    """-log of the softmax's share of the own bag, over rows and over columns; 0 where the bag is all there is."""
    bag_nn = logit_nn.masked_fill(~same_nn, -torch.inf)
    own_n = 0.5 * (bag_nn.logsumexp(1) + bag_nn.logsumexp(0))
    return 0.5 * (logit_nn.logsumexp(1) + logit_nn.logsumexp(0)) - own_n


def _above_chance(same_nn: torch.Tensor) -> torch.Tensor:
    """(n,) factor that brings a loss whose chance level is log(n / bag) to that of a bag of one sample, log n."""
    size_n = same_nn.sum(1)
    chance_n = math.log(same_nn.shape[0]) - size_n.float().log()
    return torch.where(size_n == 1, 1.0, math.log(same_nn.shape[0]) / chance_n.clamp_min(1e-6))


def _siglip(logit_nn: torch.Tensor) -> torch.Tensor:
    """-log sigmoid of every pair, positive on the diagonal; each sample takes half of its row and of its column."""
    sign_nn = 2.0 * torch.eye(logit_nn.shape[0], device=logit_nn.device) - 1.0
    loss_nn = -F.logsigmoid(sign_nn * logit_nn)
    return 0.5 * (loss_nn.sum(1) + loss_nn.sum(0))
