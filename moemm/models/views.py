"""Several views of one batch in one stream: the whole samples, some with hidden tokens, modalities apart.

One pass of the trunk then serves all objectives. T tokens, D width, B samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moemm.data.sample import PackedBatch
from moemm.modalities.base import Tokenizer, Tokens
from moemm.models.stream import Stream

Sums = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""objective -> (sum of its loss over the samples that it concerns, number of those samples), scalars fp32."""


@dataclass(slots=True)
class Views:
    """Views by name, and all of them as one stream. The samples of each view are numbered after those before it.

    place_T: where the tokens of the views, one view after the other, stand in the stream.
    known: what the one that made the views wants to know of them afterwards.
    """

    parts: dict[str, Stream]
    stream: Stream
    place_T: torch.Tensor
    known: Any = None

    @classmethod
    def stack(cls, parts: Mapping[str, Stream], known: Any = None) -> Views:
        """The views as one stream, modality by modality as the trunk wants it."""
        stream = _stack(list(parts.values()))
        order_T = torch.argsort(stream.modality_T, stable=True)
        place_T = torch.empty_like(order_T)
        place_T[order_T] = torch.arange(order_T.shape[0], device=order_T.device)
        return cls(dict(parts), select(stream, order_T, stream.lengths), place_T, known)

    def split(self, x_TD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows of the stream's tokens -> view -> its rows."""
        sizes = [part.values_TD.shape[0] for part in self.parts.values()]
        return dict(zip(self.parts, x_TD[self.place_T].split(sizes), strict=True))

    def spread(self, values: Mapping[str, torch.Tensor], *, other: int) -> torch.Tensor:
        """(T,) int64 values of some views' tokens where they stand in the stream; `other` for those of other views."""
        parts = [values.get(name, torch.full_like(part.sample_T, other)) for name, part in self.parts.items()]
        return torch.empty_like(self.stream.sample_T).scatter(0, self.place_T, torch.cat(parts))


class Pretext(nn.Module, ABC):
    """What a model learns without labels; see moemm.objectives.pretext. Holds no parameters but those of its modules.

    step: of training, set before each step; what is hidden is drawn from it.
    """

    step: int = 0
    losses: tuple[str, ...] = ()
    """Names of what it minimises, as far as gradients are told apart: each pair of a contrastive objective is one."""
    meet: bool = False
    """Whether two losses, of these or of the tasks, read one token."""
    pairs_meet: bool = False
    """Whether a sample can have two pairs of modalities to align."""

    @abstractmethod
    def views(
        self, tokens: Sequence[Tokens], content: Stream, batch: PackedBatch, tokenizers: Mapping[str, Tokenizer]
    ) -> Views:
        """The views of a batch. content: what the tokenizers made, without modality, position and time.

        The first view has the samples of the batch in their order: the tasks' heads read it.
        """

    @abstractmethod
    def readers(self, views: Views) -> torch.Tensor:
        """(B, T) int64 for each of B branches and each token of the views' stream: the number in `losses` of the loss
        whose gradient that branch brings to that token; -1 for none. B is the same for every batch.
        """  # fmt: skip

    @abstractmethod
    def owners(self, views: Views) -> torch.Tensor:
        """(T,) int64 the sample of the batch that each token of the views' stream is of."""

    @abstractmethod
    def pairs_loss(self, branches: Sequence[torch.Tensor], views: Views) -> torch.Tensor:
        """The sum of the losses of pairs alone, only to take gradients with respect to the branches."""

    @abstractmethod
    def forward(self, branches: Sequence[torch.Tensor], views: Views, *, keep_B: torch.Tensor | None = None) -> Sums:
        """The losses, from what the trunk made of the views' stream; it comes once for each branch, or once for all.

        keep_B: (B,) 1 for samples whose pairs count, 0 for those whose do not; None: all do.
        """


def select(stream: Stream, index_T: torch.Tensor, lengths: Sequence[int]) -> Stream:
    """The tokens of `index_T` (int64), modality by modality. lengths: tokens of each modality among them."""
    return replace(
        stream,
        values_TD=stream.values_TD[index_T],
        modality_T=stream.modality_T[index_T],
        sample_T=stream.sample_T[index_T],
        position_TP=stream.position_TP[index_T],
        time_T=stream.time_T[index_T],
        lengths=tuple(lengths),
    )


def _stack(streams: Sequence[Stream]) -> Stream:
    """One after the other, so not yet modality by modality."""
    samples, first = [], 0
    for stream in streams:
        samples.append(stream.sample_T + first)
        first += stream.num_samples
    return Stream(
        torch.cat([stream.values_TD for stream in streams]),
        torch.cat([stream.modality_T for stream in streams]),
        torch.cat(samples),
        torch.cat([stream.position_TP for stream in streams]),
        torch.cat([stream.time_T for stream in streams]),
        torch.cat([stream.task_B for stream in streams]),
        tuple(sum(counts) for counts in zip(*(stream.lengths for stream in streams), strict=True)),
        torch.cat([stream.presence_BM for stream in streams]),
    )
