"""A fixed number of latents in place of the tokens of each modality of a sample (Perceiver, HighMMT).

T tokens, D width, L latents, n rows (samples that have the modality).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from moemm.models.attention import Attention, AttentionPlan, Backend
from moemm.models.stream import Stream


class Latents(nn.Module):
    """Each group of modalities has latents and one attention, in which they see the tokens of their row.

    A sample without the modality has no latents of it.
    """

    def __init__(self, groups: Sequence[str], dim: int, heads: int, count: int):
        super().__init__()
        self.groups, self.count = tuple(groups), count
        names = list(dict.fromkeys(groups))
        self.start = nn.ParameterDict({name: torch.randn(count, dim) * 0.2 for name in names})
        self.norm = nn.ModuleDict({name: nn.RMSNorm(dim, eps=1e-6) for name in names})
        self.attention = nn.ModuleDict({name: Attention(dim, heads, num_layers=1) for name in names})

    def replace(self, stream: Stream, rows: Sequence[torch.Tensor], backend: Backend) -> Stream:
        """The stream of latents; rows: for each modality the sample of each of its rows, (n,) int64, ascending."""
        values_TD = self(stream.split(), rows, backend)
        modalities = [torch.full_like(row_n, number) for number, row_n in enumerate(rows)]
        place_TP = stream.position_TP.new_zeros(values_TD.shape[0], stream.position_TP.shape[1])
        return replace(
            stream,
            values_TD=values_TD,
            modality_T=torch.cat(modalities).repeat_interleave(self.count),
            sample_T=torch.cat(list(rows)).repeat_interleave(self.count),
            position_TP=place_TP,
            time_T=torch.full_like(place_TP[:, 0], float("nan")),
            lengths=tuple(len(row_n) * self.count for row_n in rows),
        )

    def forward(
        self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], rows: Sequence[torch.Tensor], backend: Backend
    ) -> torch.Tensor:
        """values_TD of that stream; parts: values_TD and sample_T of each modality.

        Tensors in and out, because ZeRO-3 looks for them there, and cannot look into a Stream.
        """
        values = []
        for name, (tokens_TD, sample_T), row_n in zip(self.groups, parts, rows, strict=True):
            values.append(self._attend(name, tokens_TD, torch.searchsorted(row_n, sample_T), len(row_n), backend))
        return torch.cat(values)

    def _attend(
        self, name: str, tokens_TD: torch.Tensor, row_T: torch.Tensor, num_rows: int, backend: Backend
    ) -> torch.Tensor:
        """(n L, D): what the latents of one modality become."""
        start_LD = self.start[name].repeat(num_rows, 1)
        own_L = torch.arange(num_rows, device=row_T.device).repeat_interleave(self.count)
        joined_TD = torch.cat([tokens_TD, start_LD.to(tokens_TD.dtype)])
        plan = AttentionPlan.make(torch.cat([row_T, own_L]), num_samples=num_rows, backend=backend)
        seen_TD = self.attention[name](self.norm[name](joined_TD), plan)
        return (joined_TD + seen_TD)[tokens_TD.shape[0] :]
