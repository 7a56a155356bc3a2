"""The packed trunk: x += attention(norm(x)); x += ffn(norm(x)), where ffn is a MoE layer or one dense network."""

from __future__ import annotations

import torch
from torch import nn

from moemm.config.schema import ModelConfig
from moemm.models.attention import Attention, AttentionPlan, Backend
from moemm.models.stream import Stream
from moemm.moe import ExpertMap, ExpertShape, FeedForward, MoELayer, RouterStats


class Block(nn.Module):
    """Pre-norm attention and MoE (or a dense FFN of the same active width). T tokens, D width."""

    def __init__(self, config: ModelConfig, expert_map: ExpertMap):
        super().__init__()
        dim, experts = config.dim, config.experts
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.attention = Attention(dim, config.heads, num_layers=config.layers)
        self.dropout = nn.Dropout(config.dropout)
        if config.moe == "dense":
            width = active_width(config)
            self.ffn: nn.Module = FeedForward(dim, width, activation=config.activation, num_layers=config.layers)
        else:
            shape = ExpertShape(
                dim=dim,
                activation=config.activation,
                num_layers=config.layers,
                top_k=experts.top_k,
                backend=experts.backend,
            )
            self.ffn = MoELayer(expert_map, shape)

    def forward(
        self, x_TD: torch.Tensor, modality_T: torch.Tensor, plan: AttentionPlan
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """(T, D) -> (T, D), and the router's statistics where there is a router."""
        x_TD = x_TD + self.dropout(self.attention(self.attention_norm(x_TD), plan))
        normed_TD = self.ffn_norm(x_TD)
        stats = None
        if isinstance(self.ffn, MoELayer):
            out_TD, stats = self.ffn(normed_TD, modality_T)
        else:
            out_TD = self.ffn(normed_TD)
        return x_TD + self.dropout(out_TD), stats


class Trunk(nn.Module):
    """All blocks, and the last norm."""

    def __init__(self, config: ModelConfig, expert_map: ExpertMap):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, expert_map) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.backend = config.attention

    def forward(self, stream: Stream) -> tuple[torch.Tensor, RouterStats | None]:
        """(T, D) of the stream -> (T, D), and the statistics of all layers."""
        x_TD, collected = stream.values_TD, []
        plan = AttentionPlan.make(stream.sample_T, num_samples=stream.num_samples, backend=self._backend(x_TD))
        for block in self.blocks:
            x_TD, stats = block(x_TD, stream.modality_T, plan)
            if stats is not None:
                collected.append(stats)
        return self.norm(x_TD), RouterStats.stack(collected) if collected else None

    def _backend(self, x_TD: torch.Tensor) -> Backend:
        """Buckets of dense blocks unless CUDA's variable-length kernels can run: they want half precision."""
        if self.backend != "auto":
            return self.backend
        return "nested" if x_TD.is_cuda and x_TD.dtype in (torch.bfloat16, torch.float16) else "padded"


def active_width(config: ModelConfig) -> int:
    """Hidden units that one token passes through in a sparse layer; the width of the dense FFN to compare with."""
    experts = config.experts
    routed = experts.top_k * experts.routed_width if experts.routed else 0
    return experts.shared_width + experts.modality_width + routed
