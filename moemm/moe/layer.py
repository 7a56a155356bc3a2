"""The MoE layer: shared, hard and routed experts, by one expert map.

T tokens, D width, E experts that are dispatched to (hard ones first, then routed ones), K slots a token, M rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moemm.config.experts import Expert
from moemm.config.schema import ExpertsBackend, RouterConfig
from moemm.moe.backends import expert_runner
from moemm.moe.dispatcher import Dispatcher, LocalDispatcher, SpreadDispatcher
from moemm.moe.exchange import Group
from moemm.moe.expert_map import ExpertMap
from moemm.moe.experts import FeedForward, LowRank
from moemm.moe.placement import dispatched as dispatched_experts
from moemm.moe.router import Router
from moemm.moe.routers import Routed
from moemm.moe.stats import RouterStats
from moemm.ops.grouped_mlp import Activation
from moemm.points import point

Slots = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShape:
    """What all experts of a trunk have in common."""

    dim: int
    activation: Activation
    num_layers: int
    backend: ExpertsBackend = "auto"


class MoELayer(nn.Module):
    """y = sum of shared(x) + sum of hard experts that serve x + sum over top-k of gate x routed_expert(x).

    expert_map: of the whole trunk; `layer` picks its part. All dispatched experts run in one op, which gives each a
    gradient, zeros where it has no rows: each rank's parameters get theirs in the same order (ZeRO-1 and 2 mix them up
    otherwise). `spread` leaves the layer with some of its experts, and sends tokens to the ranks that have the others.
    """

    hard_MK: torch.Tensor
    place_E: torch.Tensor
    column_E: torch.Tensor

    def __init__(self, expert_map: ExpertMap, shape: ExpertShape, router: RouterConfig, *, layer: int = 0):
        super().__init__()
        # The op reads the experts' weights past their modules' forward, where ZeRO-3 would gather them: it has to
        # gather this layer's parameters together. DeepSpeed looks for this name (utils.set_z3_leaf_module sets it).
        self._z3_leaf = True
        self.map, self.activation = expert_map.at_layer(layer), shape.activation
        routed, everywhere = self.map.of_role("routed"), [e.id for e in expert_map.of_role("routed")]
        dispatched = dispatched_experts(self.map)
        networks = {e.id: _network(e, shape) for e in self.map.experts if e.width}
        self.shared = nn.ModuleDict({e.id: networks[e.id] for e in self.map.of_role("shared")})
        self.experts = nn.ModuleDict({e.id: networks.get(e.id) or _low_rank(e, networks) for e in dispatched})
        self.run_experts = expert_runner(shape.backend, widths=[_width(e, networks) for e in dispatched])
        self.dispatcher: Dispatcher = LocalDispatcher(self.run_experts)
        self.num_dispatched = len(dispatched)
        self.base = {e.id: e.base for e in dispatched if e.base}
        place = {e.id: number for number, e in enumerate(dispatched)}
        # One entry more, -1, for what a slot without expert (-1) looks up.
        self.register_buffer("place_E", torch.tensor([*(place.get(e.id, -1) for e in routed), -1]), persistent=False)
        self.register_buffer("hard_MK", _hard_slots(self.map, place), persistent=False)
        columns = torch.tensor([everywhere.index(e.id) for e in routed], dtype=torch.int64)
        self.register_buffer("column_E", columns, persistent=False)
        self.num_columns = len(everywhere)
        self.router = Router(shape.dim, self.map, router) if routed else None

    def forward(
        self, x_TD: torch.Tensor, row_T: torch.Tensor, target_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, RouterStats | None]:
        """x_TD (T, D), row_T (T,) int64 -> (T, D), and the router's statistics where there is a router.

        target_T: (T,) int64, see Router.
        """
        if self.is_spread:  # what is computed beside the exchange of tokens comes behind the router
            slots, stats = self._slots(x_TD, row_T, target_T)
            beside = functools.partial(self._shared, x_TD)
        else:
            shared_TD = self._shared(x_TD)
            slots, stats = self._slots(x_TD, row_T, target_T)
            beside = functools.partial(_given, shared_TD)
        if not self.num_dispatched:
            added_TD = beside()
            return torch.zeros_like(x_TD) if added_TD is None else added_TD, stats
        gates_TK, experts_TK = (torch.cat(part, dim=1) for part in zip(*slots, strict=True))
        if not torch.compiler.is_compiling():  # it reads a clock, which no graph can hold
            point("dispatch")
        out_TD = self.dispatcher(
            x_TD, gates_TK, experts_TK, self._weights(), beside=beside, activation=self.activation
        )  # fmt: skip
        return out_TD, stats

    @property
    def is_spread(self) -> bool:
        """Whether some of the layer's experts are on other ranks."""
        return isinstance(self.dispatcher, SpreadDispatcher)

    def spread(self, positions: Mapping[str, int], *, group: Group, position: int) -> None:
        """Keep those dispatched experts that are at this rank's position of an expert-parallel group, and drop the
        others. positions: id -> position, of all of them (moe/placement.py). A layer that sends no tokens stays as it
        is. Once, before an optimizer has the parameters.
        """
        assert not self.is_spread
        if not self.num_dispatched:
            return
        ids = list(self.experts)
        spread = SpreadDispatcher(self.run_experts, ids, positions, group=group, position=position)
        self.dispatcher = spread.to(self.place_E.device)
        self.experts = nn.ModuleDict({name: self.experts[name] for name in ids if positions[name] == position})

    @property
    def num_choices(self) -> int:
        """X of `choice`: routed experts, those dispatched to (of which it takes hard ones), and none of both."""
        return len(self.place_E) - 1 + self.num_dispatched + 1

    @property
    def tells_apart(self) -> bool:
        """Whether some token goes to an expert that not all tokens go to."""
        return self.router is not None or bool(self.hard_MK.shape[1])

    def choice(self, row_T: torch.Tensor, stats: RouterStats | None) -> torch.Tensor:
        """(T,) int64 under X the expert that a token was sent to: the routed one with its highest gate; for a token
        without one, the first hard expert that serves it.

        stats: of this layer's forward pass. Reads no parameter, and nothing waits for the device.
        """
        num_routed = len(self.place_E) - 1
        choice_T = torch.full_like(row_T, self.num_choices - 1)
        if self.hard_MK.shape[1]:
            hard_T = self.hard_MK[row_T, 0]
            choice_T = torch.where(hard_T >= 0, num_routed + hard_T, choice_T)
        if stats is None or stats.slots is None:
            return choice_T
        gates_TK, experts_TK = stats.slots
        best_T1 = gates_TK.masked_fill(experts_TK < 0, -torch.inf).argmax(1, keepdim=True)
        routed_T = experts_TK.gather(1, best_T1)[:, 0]
        return torch.where(routed_T >= 0, routed_T, choice_T)

    def _shared(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        shared = [network(x_TD) for network in self.shared.values()]
        return functools.reduce(torch.add, shared) if shared else None

    def _slots(
        self, x_TD: torch.Tensor, row_T: torch.Tensor, target_T: torch.Tensor | None
    ) -> tuple[list[Slots], RouterStats | None]:
        """Gates and experts of every slot: first the hard experts (gate 1), then the routed ones."""
        slots: list[Slots] = []
        stats = None
        if self.hard_MK.shape[1]:
            hard_TK = self.hard_MK[row_T]
            slots.append((torch.ones_like(hard_TK, dtype=torch.promote_types(x_TD.dtype, torch.float32)), hard_TK))
        if self.router is not None:
            routed = self.router(x_TD, row_T, target_T)
            slots.append((routed.topk.gates_TK, self.place_E[routed.topk.experts_TK]))
            stats = self._stats(routed)
        return slots, stats

    def _weights(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """w1 and w2 of every dispatched expert that is here."""
        networks = {**self.shared, **self.experts}
        pairs = []
        for name, network in self.experts.items():
            base = networks.get(self.base.get(name, ""))
            pairs.append(network.weights(base.weights()) if base is not None else network.weights())  # type: ignore[operator]
        return [w1 for w1, _ in pairs], [w2 for _, w2 in pairs]

    def _stats(self, routed: Routed) -> RouterStats:
        """The router's sums, with a column for every routed expert of the trunk."""
        topk = routed.topk
        zero_M = torch.zeros_like(topk.z_M.detach())

        def wide(sums_ME: torch.Tensor | None) -> torch.Tensor:
            if sums_ME is None:
                return zero_M.new_zeros(1, zero_M.shape[0], self.num_columns)
            if sums_ME.shape[1] == self.num_columns:
                return sums_ME[None]
            return sums_ME.new_zeros(sums_ME.shape[0], self.num_columns).index_copy(1, self.column_E, sums_ME)[None]

        def narrow(sums_M: torch.Tensor | None) -> torch.Tensor:
            return (zero_M if sums_M is None else sums_M)[None]

        return RouterStats(
            load_LME=wide(topk.load_ME),
            prob_LME=wide(topk.prob_ME),
            smooth_LME=wide(routed.smooth_ME),
            z_LM=narrow(topk.z_M),
            entropy_LM=narrow(routed.entropy_M),
            binding_LM=narrow(routed.binding_M),
            dropped_LM=narrow(routed.dropped_M),
            tokens_M=topk.tokens_M,
            slots=(topk.gates_TK.detach(), topk.experts_TK),
        )


def _given(value: torch.Tensor | None) -> torch.Tensor | None:
    return value


def _width(expert: Expert, networks: dict[str, FeedForward]) -> int:
    return networks[expert.base or expert.id].w2_DF.shape[1]


def _network(expert: Expert, shape: ExpertShape) -> FeedForward:
    return FeedForward(shape.dim, expert.width, activation=shape.activation, num_layers=shape.num_layers)


def _low_rank(expert: Expert, networks: dict[str, FeedForward]) -> LowRank:
    assert expert.base is not None
    networks[expert.base].requires_grad_(False)
    return LowRank(networks[expert.base], expert.rank)


def _hard_slots(layer_map: ExpertMap, place: dict[str, int]) -> torch.Tensor:
    """(M, K) int64: the dispatched experts that run on every token of a row; -1 where a row has fewer."""
    hard = layer_map.of_role("hard")
    rows = [[place[expert.id] for expert in hard if expert.serves(*row)] for row in layer_map.rows]
    most = max(map(len, rows))
    return torch.tensor([row + [-1] * (most - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), most)
