"""The router of one layer: its weights, and what it gives a router function. T tokens, D width, E experts, M rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from moemm.config.experts import TAKE_ALL, active_experts
from moemm.config.schema import RouterConfig
from moemm.errors import ConfigError
from moemm.exact import ExactBuffers
from moemm.moe.expert_map import ExpertMap
from moemm.moe.routers import CAPACITY, P, Routed, RouteInput, find_router, route


class Router(ExactBuffers):
    """One row of weights an expert (and modality, in scopes of one), stored by name: adding an expert adds a tensor and
    reshapes none.

    Computes in fp32 also where the stream is narrower. A modality's forbidden experts get -inf before the softmax.

    Raises ConfigError where top_k is more than a modality may use, or `scope: disjoint` and experts serve several.
    """

    allowed_ME: torch.Tensor
    columns_SE: torch.Tensor

    def __init__(self, dim: int, layer_map: ExpertMap, config: RouterConfig):
        super().__init__()
        self.kind, self.config = find_router(config.kind), config
        self.ids = [expert.id for expert in layer_map.of_role("routed")]
        self.register_buffer("allowed_ME", layer_map.allowed("routed"), persistent=False)
        self.top_k = _top_k(layer_map, config)
        self.most = int(self.allowed_ME.sum(-1).max())
        self.num_tasks = max(1, len(layer_map.tasks))
        # Disjoint experts have their modality's row as it is: rows of other modalities would never be looked at.
        self.scopes = list(layer_map.modalities) if config.scope == "modality" else ["all"]
        _check_scope(layer_map, config)
        self.pairs = _pairs(layer_map, self.scopes) if self.kind.learned else []
        flat = [pair for pairs in self.pairs for pair in pairs]
        self.rows = nn.ModuleDict(
            {name: _rows([expert for scope, expert in flat if scope == name], dim, 0.02) for name in self.scopes}
        )
        column = {pair: number for number, pair in enumerate(flat)}
        columns = [[column.get((scope, name), 0) for name in self.ids] for scope in self.scopes]
        self.register_buffer("columns_SE", torch.tensor(columns), persistent=False)
        self.noise = _rows(self.ids, dim, 0.0) if self.kind.noisy else None
        for name in self.ids if config.bias_rate else ():
            self.register_buffer(f"bias_{name}", torch.zeros(()))

    def forward(self, x_TD: torch.Tensor, row_T: torch.Tensor, target_T: torch.Tensor | None = None) -> Routed:
        """Gates, experts and sums of the tokens x_TD (T, D); row_T (T,) int64 of the expert map.

        target_T: (T,) int64 routed expert that a token is bound to, for `kind: combination`.
        """
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(wide)
            logits_TE = self._logits(x_TD, row_T)
            noise_TE = None
            if self.noise is not None and self.training:
                noise_TE = F.softplus(F.linear(x_TD, _stack(self.noise, self.ids, wide))) + 0.01
            given = RouteInput(
                logits_TE=logits_TE,
                row_T=row_T,
                allowed_ME=self.allowed_ME,
                top_k=self.top_k,
                most=self.most,
                gates=self.config.gates,
                p=self.config.p or P,
                capacity=self.config.capacity or CAPACITY,
                bias_E=self.bias(),
                noise_TE=noise_TE,
                target_T=target_T,
            )
            return route(self.kind, given, entropy=self.config.losses.local_entropy > 0)

    def bias(self) -> torch.Tensor | None:
        """(E,) fp32 added to the scores for choosing only; None without `bias_rate`."""
        return torch.stack([getattr(self, f"bias_{name}") for name in self.ids]) if self.config.bias_rate else None

    @torch.no_grad()
    def update_bias(self, load_E: torch.Tensor) -> None:
        """One move of every bias towards even load (arXiv:2408.15664); load_E (E,): of the step, over all ranks."""
        for name, less in zip(self.ids, torch.sign(load_E.mean() - load_E), strict=True):
            getattr(self, f"bias_{name}").add_(self.config.bias_rate * less)

    def _logits(self, x_TD: torch.Tensor, row_T: torch.Tensor) -> torch.Tensor:
        if not self.kind.learned:
            return x_TD.new_zeros(x_TD.shape[0], len(self.ids))
        # Of each extension by themselves: a product with more columns may have other bits in those of before.
        parts = [self._products(x_TD, pairs) for pairs in self.pairs]
        logits_TX = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if len(self.scopes) == 1:
            return logits_TX
        return logits_TX.gather(1, self.columns_SE[row_T.div(self.num_tasks, rounding_mode="floor")])

    def _products(self, x_TD: torch.Tensor, pairs: Sequence[tuple[str, str]]) -> torch.Tensor:
        """(T, number of pairs) logits of pairs of a scope and an expert."""
        rows = [getattr(self.rows[scope], name) for scope, name in pairs]
        weight_XD = torch.stack([row.to(x_TD.dtype) for row in rows])
        logits_TX = F.linear(x_TD, weight_XD)
        if not self.kind.distance:
            return logits_TX
        square_TX = x_TD.square().sum(-1, keepdim=True) + weight_XD.square().sum(-1) - 2 * logits_TX
        return -square_TX.clamp_min(1e-12).sqrt()


def _pairs(layer_map: ExpertMap, scopes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """The pairs of a scope and a routed expert that have weights, those of each extension together, oldest first.

    A pair comes with the later one of its two. What an extension brings has pairs only where it may be used.
    """
    routed = layer_map.of_role("routed")
    found: dict[int, list[tuple[str, str]]] = {}
    for scope, expert in itertools.product(scopes, routed):
        number = max(layer_map.came.get(scope, 0), expert.added)
        if not number or scope == "all" or expert.serves(scope):
            found.setdefault(number, []).append((scope, expert.id))
    return [found[number] for number in sorted(found)]


def _rows(ids: list[str], dim: int, deviation: float) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.randn(dim) * deviation) for name in ids})


def _stack(rows: nn.Module, ids: list[str], dtype: torch.dtype) -> torch.Tensor:
    """(E, D); by name, because a ParameterDict sorts: routed_10 before routed_2."""
    return torch.stack([getattr(rows, name).to(dtype) for name in ids])


def _top_k(layer_map: ExpertMap, config: RouterConfig) -> int:
    """Slots a token, checked against what each row may use."""
    number_M = layer_map.allowed("routed").sum(-1)
    fewest, most = int(number_M.min()), int(number_M.max())
    top_k = active_experts(config) or most
    needed = 1 if config.kind in TAKE_ALL else top_k
    if fewest < needed:
        modality, task = layer_map.rows[int(number_M.argmin())]
        who = modality if task is None else f"{modality} in task {task}"
        raise ConfigError(
            f"model.router.top_k is {top_k}, but {who} may use only {fewest} routed experts; lower it, or add routed "
            f"(or zero) experts that serve {who}"
        )
    return min(top_k, len(layer_map.of_role("routed")))


def _check_scope(layer_map: ExpertMap, config: RouterConfig) -> None:
    if config.scope != "disjoint":
        return
    for expert in layer_map.of_role("routed"):
        served = [name for name in layer_map.modalities if expert.serves(name)]
        if len(served) > 1:
            raise ConfigError(
                f"model.router.scope is disjoint, but expert {expert.id} serves {', '.join(served)}; give its group "
                "`per_modality: true`, or `modalities` with one name"
            )
