"""Attention over the tokens of one sample, for samples of any length packed into one stream.

T tokens, D width, H heads, B samples, S samples of one bucket, L its longest length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from moemm.models.untied import call, tied_or_not

Backend = Literal["padded", "nested"]
# A bucket holds samples up to this factor longer than its shortest, plus some tokens (benchmarks/attention.py).
BUCKET_RATIO, BUCKET_SLACK = 1.25, 4


@dataclass(frozen=True, slots=True)
class Bucket:
    """Samples of similar length: index_SL of their tokens in the stream, mask_SL where there is one; None if all.

    sees_SLL: which tokens (last axis) each token sees, where not all of its sample.
    """

    index_SL: torch.Tensor
    mask_SL: torch.Tensor | None
    sees_SLL: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How the tokens of each sample are brought together; made once a batch, used by every block.

    padded: buckets, and inverse_T, the place of each token among the rows that the buckets give, joined.
    nested: order_T that sorts the stream by sample, its inverse_T, and offsets of the samples (B+1,).
    """

    backend: Backend
    inverse_T: torch.Tensor
    buckets: tuple[Bucket, ...] = ()
    order_T: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    longest: int = 0

    @classmethod
    def make(
        cls,
        sample_T: torch.Tensor,
        *,
        num_samples: int,
        backend: Backend,
        ratio: float = BUCKET_RATIO,
        rank_T: torch.Tensor | None = None,
    ) -> AttentionPlan:
        """Plan for a stream whose tokens belong to the samples sample_T (T,) int64.

        rank_T: (T,) int64; a token sees those of its sample whose rank is at most its own (padded only).
        """
        assert rank_T is None or backend == "padded", "check_experts.py refuses an order with nested tensors"
        order_T = torch.argsort(sample_T, stable=True)
        lengths_B = torch.bincount(sample_T, minlength=num_samples)
        if backend == "nested":
            offsets = F.pad(lengths_B.cumsum(0), (1, 0))
            longest = int(lengths_B.max()) if num_samples else 0
            return cls(backend, _invert(order_T), (), order_T, offsets, longest)
        buckets = tuple(_buckets(order_T, lengths_B, ratio))
        if rank_T is not None:
            buckets = tuple(_ordered(bucket, rank_T) for bucket in buckets)
        rows = [b.index_SL.flatten() if b.mask_SL is None else b.index_SL[b.mask_SL] for b in buckets]
        return cls(backend, _invert(torch.cat(rows) if rows else order_T), buckets)


class Attention(nn.Module):
    """Multi-head attention inside each sample, with RMS-normalised queries and keys (arXiv:2010.04245).

    untied: group of each modality, where groups have projections of their own.
    """

    def __init__(self, dim: int, heads: int, *, num_layers: int, untied: Sequence[str] | None = None):
        super().__init__()
        self.heads, self.width = heads, dim // heads
        self.qkv = tied_or_not(untied, lambda: _projection(dim))
        self.out = nn.Linear(dim, dim, bias=False)
        self.query_norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(dim // heads, eps=1e-6)
        nn.init.normal_(self.out.weight, std=(2 * num_layers * dim) ** -0.5)

    def forward(self, x_TD: torch.Tensor, plan: AttentionPlan, lengths: Sequence[int] = ()) -> torch.Tensor:
        """(T, D) -> (T, D); T = 0 included. lengths: tokens of each modality, for untied projections."""
        qkv = call(self.qkv, x_TD, lengths).view(x_TD.shape[0], 3, self.heads, self.width)
        query_THd, key_THd = self.query_norm(qkv[:, 0]), self.key_norm(qkv[:, 1])
        qkv = torch.stack([query_THd, key_THd, qkv[:, 2]], dim=1)
        attend = _nested if plan.backend == "nested" else _padded
        return self.out(attend(qkv, plan).flatten(1))


def _projection(dim: int) -> nn.Linear:
    linear = nn.Linear(dim, 3 * dim, bias=False)
    nn.init.normal_(linear.weight, std=dim**-0.5)
    return linear


def _padded(qkv: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """(T, 3, H, d) -> (T, H, d): one dense attention a bucket."""
    parts = [qkv[:0, 0]]
    for bucket in plan.buckets:
        query, key, value = rearrange(qkv[bucket.index_SL], "s l three h d -> three s h l d")
        mask = None if bucket.mask_SL is None else bucket.mask_SL[:, None, None]
        if bucket.sees_SLL is not None:
            mask = bucket.sees_SLL[:, None]
        out_SLHd = F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
        parts.append(out_SLHd.flatten(0, 1) if bucket.mask_SL is None else out_SLHd[bucket.mask_SL])
    return torch.cat(parts)[plan.inverse_T]


def _nested(qkv: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """(T, 3, H, d) -> (T, H, d) through a jagged nested tensor: the variable-length kernels of CUDA."""
    if not qkv.shape[0]:
        return qkv[:, 0]
    query, key, value = (
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(), plan.offsets, min_seqlen=0, max_seqlen=plan.longest
        ).transpose(1, 2)
        for part in qkv[plan.order_T].unbind(1)
    )
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).values()[plan.inverse_T]


def _buckets(order_T: torch.Tensor, lengths_B: torch.Tensor, ratio: float) -> list[Bucket]:
    """Samples sorted by length, cut where the length exceeds the bucket's shortest by too much."""
    starts_B = lengths_B.cumsum(0) - lengths_B
    by_length = torch.argsort(lengths_B, stable=True)
    by_length = by_length[lengths_B[by_length] > 0]
    lengths = lengths_B[by_length].tolist()
    cuts, low = [0], lengths[0] if lengths else 0
    for position, length in enumerate(lengths):
        if length > ratio * low + BUCKET_SLACK:
            cuts.append(position)
            low = length
    found = []
    for first, last in zip(cuts, [*cuts[1:], len(lengths)], strict=True):
        if last > first:
            chosen = by_length[first:last]
            step_L = torch.arange(lengths[last - 1], device=order_T.device)
            mask_SL = step_L < lengths_B[chosen][:, None]
            # Behind its end a row repeats its own last token: 0 x inf of another sample's token would be NaN.
            own_SL = torch.minimum(step_L, lengths_B[chosen][:, None] - 1)
            index_SL = order_T[starts_B[chosen][:, None] + own_SL]
            full = lengths[first] == lengths[last - 1]
            found.append(Bucket(index_SL, None if full else mask_SL))
    return found


def _ordered(bucket: Bucket, rank_T: torch.Tensor) -> Bucket:
    """The bucket whose tokens see ranks up to their own; the repeated tokens behind a row's end are seen by none."""
    rank_SL = rank_T[bucket.index_SL]
    sees_SLL = rank_SL[:, None, :] <= rank_SL[:, :, None]
    if bucket.mask_SL is not None:
        sees_SLL = sees_SLL & bucket.mask_SL[:, None, :]
    return replace(bucket, sees_SLL=sees_SLL)


def _invert(order_T: torch.Tensor) -> torch.Tensor:
    """The inverse permutation."""
    inverse_T = torch.empty_like(order_T)
    inverse_T[order_T] = torch.arange(order_T.numel(), device=order_T.device)
    return inverse_T
