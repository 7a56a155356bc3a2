"""The MoE layer: shared expert + modality experts + routed experts, by one expert map.

T tokens, D width, E experts that are dispatched to (modality ones first, then routed ones), K slots a token.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from moemm.config.schema import ExpertsBackend
from moemm.moe.backends import expert_runner
from moemm.moe.expert_map import ExpertMap
from moemm.moe.experts import FeedForward
from moemm.moe.router import Router
from moemm.moe.stats import RouterStats
from moemm.ops.grouped_mlp import Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What all experts of a trunk have in common."""

    dim: int
    activation: Activation
    num_layers: int
    top_k: int
    backend: ExpertsBackend = "auto"


class MoELayer(nn.Module):
    """y = shared(x) + modality_expert(x) + sum over top-k of gate x routed_expert(x).

    All dispatched experts run in one op, which gives each a gradient, zeros where it has no rows: each rank's
    parameters get theirs in the same order (ZeRO-1 and 2 mix them up otherwise).
    """

    own_M: torch.Tensor | None

    def __init__(self, expert_map: ExpertMap, shape: ExpertShape):
        super().__init__()
        # The op reads the experts' weights past their modules' forward, where ZeRO-3 would gather them: it has to
        # gather this layer's parameters together. DeepSpeed looks for this name (utils.set_z3_leaf_module sets it).
        self._z3_leaf = True
        self.map, self.activation = expert_map, shape.activation
        self.shared = nn.ModuleDict({e.id: _expert(e.width, shape) for e in expert_map.of_kind("shared")})
        dispatched = expert_map.of_kind("modality") + expert_map.of_kind("routed")
        self.experts = nn.ModuleDict({e.id: _expert(e.width, shape) for e in dispatched})
        self.run_experts = expert_runner(shape.backend, widths=[e.width for e in dispatched])
        self.num_modality_experts = len(expert_map.of_kind("modality"))
        allowed_ME = expert_map.allowed("modality")
        self.register_buffer("own_M", allowed_ME.int().argmax(-1) if allowed_ME.numel() else None, persistent=False)
        routed = expert_map.of_kind("routed")
        self.router = (
            Router(shape.dim, [e.id for e in routed], expert_map.allowed("routed"), top_k=shape.top_k)
            if routed
            else None
        )

    def forward(self, x_TD: torch.Tensor, modality_T: torch.Tensor) -> tuple[torch.Tensor, RouterStats | None]:
        """x_TD (T, D), modality_T (T,) int64 -> (T, D), and the router's statistics where there is a router."""
        shared = [network(x_TD) for network in self.shared.values()]
        shared_TD = functools.reduce(torch.add, shared) if shared else None
        if shared_TD is not None and not self.experts:
            return shared_TD, None
        gates_TK, experts_TK, stats = self._slots(x_TD, modality_T)
        w1, w2 = ([getattr(expert, name) for expert in self.experts.values()] for name in ("w1_FD", "w2_DF"))
        out_TD = self.run_experts(x_TD, gates_TK, experts_TK, w1, w2, residual_TD=shared_TD, activation=self.activation)
        return out_TD, stats

    def _slots(
        self, x_TD: torch.Tensor, modality_T: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, RouterStats | None]:
        """Gates and experts of every slot: first the modality's own expert (gate 1), then the routed ones."""
        gates, experts, stats = [], [], None
        if self.own_M is not None:
            wide = torch.promote_types(x_TD.dtype, torch.float32)
            gates.append(x_TD.new_ones(x_TD.shape[0], 1, dtype=wide))
            experts.append(self.own_M[modality_T, None])
        if self.router is not None:
            routed = self.router(x_TD, modality_T)
            gates.append(routed.gates_TK)
            experts.append(routed.experts_TK + self.num_modality_experts)
            stats = RouterStats(routed.load_ME[None], routed.prob_ME[None], routed.z_M[None], routed.tokens_M)
        return torch.cat(gates, dim=1), torch.cat(experts, dim=1), stats


def _expert(width: int, shape: ExpertShape) -> FeedForward:
    return FeedForward(shape.dim, width, activation=shape.activation, num_layers=shape.num_layers)
