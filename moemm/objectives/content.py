"""What the objectives without labels know of a batch: its tokens before place and time, and what each of them holds.

T tokens, D width, B samples, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moemm.data.sample import PackedBatch
from moemm.modalities import Targets, Tokenizer, Tokens
from moemm.models.stream import Stream
from moemm.objectives.draws import combine


@dataclass(slots=True)
class Content:
    """stream: values are the tokenizers' alone. spans: modality -> where its tokens stand in the stream.

    targets: modality -> what its tokens hold, for kinds that can tell. group_T: see TargetShape.
    key_B, key_T (int64): a hash of step, task and sample; and of modality and place in the sample besides.
    present_BM: which sample has tokens of which modality. index_B: where each stands in its task's file.
    bag_B: equal for samples of one thing.
    """

    stream: Stream
    spans: dict[str, slice]
    targets: dict[str, Targets]
    group_T: torch.Tensor
    key_B: torch.Tensor
    key_T: torch.Tensor
    present_BM: torch.Tensor
    index_B: torch.Tensor
    bag_B: torch.Tensor

    @classmethod
    def make(
        cls,
        tokens: Sequence[Tokens],
        stream: Stream,
        batch: PackedBatch,
        tokenizers: Mapping[str, Tokenizer],
        *,
        seed: int,
        step: int,
    ) -> Content:
        """Read the targets of every modality, and name every token."""
        spans, targets, groups, first = {}, {}, [], 0
        for (name, packed), part in zip(batch.modalities.items(), tokens, strict=True):
            spans[name] = slice(first, first + part.row_T.shape[0])
            first += part.row_T.shape[0]
            if tokenizers[name].target_shape is not None:
                targets[name] = _kept(tokenizers[name].targets(packed), part)
            groups.append(targets[name].group_T if name in targets else torch.zeros_like(part.row_T))
        key_B = combine(seed, step, batch.task, batch.index)
        key_T = combine(key_B[stream.sample_T], stream.modality_T, _place(stream))
        present_BM = torch.zeros(batch.num_samples, len(tokens), dtype=torch.bool, device=key_T.device)
        present_BM[stream.sample_T, stream.modality_T] = True
        return cls(stream, spans, targets, torch.cat(groups), key_B, key_T, present_BM, batch.index, batch.bag)

    def with_values(self, values_TD: torch.Tensor) -> Stream:
        """The stream with other values."""
        return replace(self.stream, values_TD=values_TD)


def _kept(targets: Targets, tokens: Tokens) -> Targets:
    """The targets of the tokens that the tokenizer kept."""
    return targets if tokens.source_T is None else Targets(*(part[tokens.source_T] for part in targets))


def _place(stream: Stream) -> torch.Tensor:
    """(T,) the number of each token among those of its sample and modality, which stand together."""
    place_T = torch.arange(stream.sample_T.shape[0], device=stream.sample_T.device)
    begins_T = torch.ones_like(place_T, dtype=torch.bool)
    begins_T[1:] = (stream.sample_T.diff() != 0) | (stream.modality_T.diff() != 0)
    return place_T - place_T[begins_T][begins_T.long().cumsum(0) - 1]


def mean_over_samples(loss_T: torch.Tensor, cell_T: torch.Tensor, shape: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Sum over samples of the mean over its modalities of the mean over their tokens, and the number of samples.

    loss_T: of the tokens that count, fp32. cell_T: sample x M + modality. shape: (B, M). So a sample counts the same
    whatever its length and its modalities; no token at all gives 0, with a gradient.
    """
    sum_C = loss_T.new_zeros(shape[0] * shape[1]).index_add(0, cell_T, loss_T)
    count_C = torch.bincount(cell_T, minlength=shape[0] * shape[1])
    mean_BM = (sum_C / count_C.clamp_min(1)).view(shape)
    filled_B = (count_C.view(shape) > 0).sum(1)
    return (mean_BM.sum(1) / filled_B.clamp_min(1)).sum(), (filled_B > 0).sum().float()


def mean_tokens(x_TD: torch.Tensor, sample_T: torch.Tensor, num_samples: int) -> torch.Tensor:
    """(num_samples, D) fp32 means over the tokens of each sample; zeros where it has none."""
    total_BD = x_TD.new_zeros(num_samples, x_TD.shape[1], dtype=torch.float32).index_add(0, sample_T, x_TD.float())
    return total_BD / torch.bincount(sample_T, minlength=num_samples).clamp_min(1)[:, None]
