"""The packed stream: the tokens of all modalities of all samples, one after the other, nothing padded.

Tokens stand modality by modality (experts then read runs of memory), and inside a modality sample by sample; behind
them stand the tokens that stand in for it where samples lack it.
T tokens, D width, B samples, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moemm.data.sample import PackedBatch
from moemm.modalities.base import Tokens


@dataclass(frozen=True, slots=True)
class Absent:
    """A pairs of a sample and a modality that it lacks, by modality, inside a modality by sample.

    modality_A, sample_A: (A,) int64. counts_M: how many of each modality, on the host.
    """

    modality_A: torch.Tensor
    sample_A: torch.Tensor
    counts_M: tuple[int, ...]

    def samples(self) -> list[torch.Tensor]:
        """Per modality the samples that lack it."""
        return list(self.sample_A.split(list(self.counts_M)))


@dataclass(slots=True)
class Stream:
    """values_TD (T, D); modality_T, sample_T (T,) int64; position_TP (T, 3), time_T (T,); task_B (B,) int64.

    lengths: tokens of each modality, on the host.
    presence_BM: (B, M) bool, the modalities that a sample came with; a token may stand for one that it lacks.
    missing: loss of the regression of absent modalities, see models/missing.py; None where there is none.
    """

    values_TD: torch.Tensor
    modality_T: torch.Tensor
    sample_T: torch.Tensor
    position_TP: torch.Tensor
    time_T: torch.Tensor
    task_B: torch.Tensor
    lengths: tuple[int, ...]
    presence_BM: torch.Tensor
    missing: torch.Tensor | None = None

    @property
    def num_samples(self) -> int:
        """B."""
        return self.task_B.shape[0]

    def split(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """values_TD and sample_T of each modality."""
        sizes = list(self.lengths)
        return list(zip(self.values_TD.split(sizes), self.sample_T.split(sizes), strict=True))

    def extended(self, added: Absent, values_AD: torch.Tensor) -> Stream:
        """The stream with a token for each absent pair, behind those of its modality, without a place or a time."""
        position_AP = self.position_TP.new_zeros(len(added.sample_A), self.position_TP.shape[1])
        time_A = torch.full_like(position_AP[:, 0], float("nan"))

        def merge(mine: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
            pairs = zip(mine.split(list(self.lengths)), others.split(list(added.counts_M)), strict=True)
            return torch.cat([part for pair in pairs for part in pair])

        return replace(
            self,
            values_TD=merge(self.values_TD, values_AD.to(self.values_TD.dtype)),
            modality_T=merge(self.modality_T, added.modality_A),
            sample_T=merge(self.sample_T, added.sample_A),
            position_TP=merge(self.position_TP, position_AP),
            time_T=merge(self.time_T, time_A),
            lengths=tuple(own + more for own, more in zip(self.lengths, added.counts_M, strict=True)),
        )


def join(parts: Sequence[Tokens], batch: PackedBatch) -> Stream:
    """The tokens of every modality, in the batch's order of modalities, as one stream."""
    samples = [packed.sample[tokens.row_T] for packed, tokens in zip(batch.modalities.values(), parts, strict=True)]
    numbers = [torch.full_like(tokens.row_T, number) for number, tokens in enumerate(parts)]
    return Stream(
        torch.cat([tokens.values_TD for tokens in parts]),
        torch.cat(numbers),
        torch.cat(samples),
        torch.cat([tokens.position_TP for tokens in parts]),
        torch.cat([tokens.time_T for tokens in parts]),
        batch.task,
        tuple(tokens.row_T.shape[0] for tokens in parts),
        batch.presence,
    )
