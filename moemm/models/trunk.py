"""The packed trunk: x += attention(norm(x)); x += ffn(norm(x)), where ffn is a MoE layer or one dense network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from moemm.config.schema import ModelConfig
from moemm.models.attention import Attention, AttentionPlan, Backend
from moemm.models.stream import Stream
from moemm.models.untied import call, norm_maker, share_groups
from moemm.moe import (
    Expert,
    ExpertMap,
    ExpertShape,
    FeedForward,
    MoELayer,
    RouterStats,
    active_experts,
    bound_expert,
)


class Block(nn.Module):
    """Pre-norm attention and MoE (or a dense FFN of the same active width). T tokens, D width."""

    def __init__(self, config: ModelConfig, expert_map: ExpertMap, *, layer: int):
        super().__init__()
        dim = config.dim
        qkv = share_groups(expert_map.modalities, config.share) if "qkv" in config.untie else None
        norm = norm_maker(config, expert_map.modalities)
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = Attention(dim, config.heads, num_layers=config.layers, untied=qkv)
        self.dropout = nn.Dropout(config.dropout)
        if config.moe == "dense":
            width = active_width(config, expert_map)
            self.ffn: nn.Module = FeedForward(dim, width, activation=config.activation, num_layers=config.layers)
        else:
            shape = ExpertShape(
                dim=dim,
                activation=config.activation,
                num_layers=config.layers,
                backend=config.experts.backend,
            )
            self.ffn = MoELayer(expert_map, shape, config.router, layer=layer)

    def forward(
        self,
        x_TD: torch.Tensor,
        row_T: torch.Tensor,
        plan: AttentionPlan,
        lengths: Sequence[int],
        target_T: torch.Tensor | None,
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """(T, D) -> (T, D), and the router's statistics where there is a router.

        row_T, target_T: see MoELayer. lengths: tokens of each modality.
        """
        x_TD = x_TD + self.dropout(self.attention(call(self.attention_norm, x_TD, lengths), plan, lengths))
        normed_TD = call(self.ffn_norm, x_TD, lengths)
        stats = None
        if isinstance(self.ffn, MoELayer):
            out_TD, stats = self.ffn(normed_TD, row_T, target_T)
        else:
            out_TD = self.ffn(normed_TD)
        return x_TD + self.dropout(out_TD), stats


class _ComputeAgainFirst(torch.autograd.Function):
    """The last node of a block, which has the block computed again before the backward pass of any other.

    A block is computed again where the first of its nodes asks for what it saved. Were that a node of a module, ZeRO-3
    would have fetched the module's weights just before, and let go of them at the end of computing it again.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_TD.new_empty(0))
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        assert len(ctx.saved_tensors) == 1
        return gradients[0]


class TrunkOutput(NamedTuple):
    """states: the stream (T, D) after the last block (with `predict_every_block` after each), through the last norm.

    router: statistics of the layers that have a router; None without one.
    expert_T: (T,) int64 the expert that the last block sent each token to, see MoELayer.choice; None in a dense model.
    """

    states: list[torch.Tensor]
    router: RouterStats | None
    expert_T: torch.Tensor | None


class Trunk(nn.Module):
    """All blocks, and the last norm."""

    def __init__(self, config: ModelConfig, expert_map: ExpertMap):
        super().__init__()
        self.map, self.bound = expert_map, config.router.kind == "combination"
        self.blocks = nn.ModuleList(Block(config, expert_map, layer=layer) for layer in range(config.layers))
        self.norm = norm_maker(config, expert_map.modalities)()
        self.backend_name, self.ordered = config.attention, config.ordered
        self.every_block = config.predict_every_block
        self.recompute = False
        """Whether the backward pass computes each block again rather than keep what is in it; set for training."""

    def forward(self, stream: Stream, *, by_expert: bool = False) -> TrunkOutput:
        """The stream through all blocks. by_expert: also say where the last block sent each token."""
        x_TD, states, collected, stats = stream.values_TD, [], [], None
        backend, rank_T = self.backend(x_TD), stream.modality_T if self.ordered else None
        plan = AttentionPlan.make(stream.sample_T, num_samples=stream.num_samples, backend=backend, rank_T=rank_T)
        row_T = self.map.row(stream.modality_T, stream.task_B[stream.sample_T])
        for block in self.blocks:
            x_TD, stats = self._run(block, x_TD, row_T, plan, stream.lengths, self._targets(block, stream, row_T))
            states.append(x_TD)
            if stats is not None:
                collected.append(stats)
        wanted = states if self.every_block else states[-1:]
        out = [call(self.norm, state_TD, stream.lengths) for state_TD in wanted]
        last = self.blocks[-1].ffn
        expert_T = last.choice(row_T, stats) if by_expert and isinstance(last, MoELayer) else None
        return TrunkOutput(out, RouterStats.stack(collected) if collected else None, expert_T)

    def _run(self, block: nn.Module, *inputs: Any) -> tuple[torch.Tensor, RouterStats | None]:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            out: tuple[torch.Tensor, RouterStats | None] = block(*inputs)
            return out

        # Re-entrant checkpointing would hide parameters from the graph that the guard reads. A block that stops early
        # would leave out the hooks with which ZeRO-3 lets go of weights.
        def run(*inputs: Any) -> tuple[torch.Tensor, RouterStats | None]:
            x_TD, stats = block(*inputs)
            return _ComputeAgainFirst.apply(x_TD), stats

        with set_checkpoint_early_stop(False):
            again: tuple[torch.Tensor, RouterStats | None] = checkpoint(run, *inputs, use_reentrant=False)
        return again

    @property
    def routed_layers(self) -> dict[int, MoELayer]:
        """Layer number -> MoE layer, of those with a router: the L of RouterStats."""
        found = {number: block.ffn for number, block in enumerate(self.blocks)}
        return {number: ffn for number, ffn in found.items() if isinstance(ffn, MoELayer) and ffn.router is not None}

    def allowed(self) -> torch.Tensor | None:
        """(L, M, E) bool: which row may use which routed expert, in the layers that have a router; None without."""
        found = []
        for layer in self.routed_layers.values():
            assert layer.router is not None
            allowed_ME = layer.router.allowed_ME
            wide_ME = allowed_ME.new_zeros(allowed_ME.shape[0], layer.num_columns)
            found.append(wide_ME.index_copy(1, layer.column_E, allowed_ME))
        return torch.stack(found) if found else None

    def _targets(self, block: nn.Module, stream: Stream, row_T: torch.Tensor) -> torch.Tensor | None:
        """(T,) the expert that each token is bound to by the modalities of its sample, for `kind: combination`."""
        layer = block.ffn
        if not self.bound or not isinstance(layer, MoELayer) or layer.router is None:
            return None
        return bound_expert(stream.presence_BM, layer.router.allowed_ME)[stream.sample_T, row_T]

    def backend(self, x_TD: torch.Tensor) -> Backend:
        """Buckets of dense blocks unless CUDA's variable-length kernels can run: they want half precision."""
        if self.backend_name != "auto":
            return self.backend_name
        if self.ordered:
            return "padded"
        return "nested" if x_TD.is_cuda and x_TD.dtype in (torch.bfloat16, torch.float16) else "padded"


def active_width(config: ModelConfig, expert_map: ExpertMap) -> int:
    """Hidden units that one token passes through at most in a sparse layer; the width of the dense FFN to compare with.

    Layers with fewer experts count too: the mean over layers.
    """
    top_k = active_experts(config.router)
    layers = [expert_map.at_layer(layer) for layer in range(config.layers)]
    widest = [max(one.active(row, _width, top_k=top_k) for row in one.rows) for one in layers]
    return max(1, round(sum(widest) / len(widest)))


def _width(expert: Expert) -> int:
    return expert.width
