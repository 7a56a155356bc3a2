"""The packed stream: the tokens of all modalities of all samples, one after the other, nothing padded.

Tokens stand modality by modality (experts then read runs of memory), and inside a modality sample by sample.
T tokens, D width, B samples, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moemm.data.sample import PackedBatch
from moemm.modalities.base import Tokens


@dataclass(slots=True)
class Stream:
    """values_TD (T, D); modality_T, sample_T (T,) int64; position_TP (T, 3), time_T (T,); task_B (B,) int64.

    lengths: tokens of each modality, on the host.
    """

    values_TD: torch.Tensor
    modality_T: torch.Tensor
    sample_T: torch.Tensor
    position_TP: torch.Tensor
    time_T: torch.Tensor
    task_B: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """B."""
        return self.task_B.shape[0]

    def split(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """values_TD and sample_T of each modality."""
        sizes = list(self.lengths)
        return list(zip(self.values_TD.split(sizes), self.sample_T.split(sizes), strict=True))


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
    )
