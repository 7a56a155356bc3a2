"""From token to gates: which routed experts a token uses, and how much of each.

T tokens, D width, E routed experts, K chosen, M modalities. A router is a function of logits, registered by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from moemm import ops
from moemm.errors import ConfigError
from moemm.moe.stats import sum_by_modality
from moemm.ops import RouteTopk


class Routing(NamedTuple):
    """What a router function of one's own returns.

    gates_TK floating, experts_TK int64, prob_TE the probabilities that the gates were taken from.
    """

    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    prob_TE: torch.Tensor


RouterFunction = Callable[..., Routing]
ROUTERS: dict[str, Callable[..., RouteTopk]] = {
    "softmax": functools.partial(ops.route_topk, kind="softmax"),
    "sigmoid": functools.partial(ops.route_topk, kind="sigmoid"),
}
"""Name -> (logits_TE, modality_T, allowed_ME, top_k=) -> RouteTopk. Gates are not renormalised: a router then has a
gradient at k = 1 too. (Top-k before softmax, and softmax followed by renormalising, give exactly zero there.)"""


def register_router(name: str) -> Callable[[RouterFunction], RouterFunction]:
    """Make a function (masked logits_TE, top_k=) -> Routing known by name; forbidden experts' logits are -inf."""

    def add(function: RouterFunction) -> RouterFunction:
        if name in ROUTERS:
            raise ConfigError(f"router '{name}' is registered twice; give {function.__module__} another name")
        ROUTERS[name] = functools.partial(_with_statistics, function)
        return function

    return add


def _with_statistics(
    function: RouterFunction, logits_TE: torch.Tensor, modality_T: torch.Tensor, allowed_ME: torch.Tensor, *, top_k: int
) -> RouteTopk:
    """Calls a router function on masked logits and takes the sums that the losses need."""
    logits_TE = logits_TE.masked_fill(~allowed_ME[modality_T], float("-inf"))
    gates_TK, experts_TK, prob_TE = function(logits_TE, top_k=top_k)
    total = functools.partial(sum_by_modality, modality_T=modality_T, num_modalities=allowed_ME.shape[0])
    chosen_TE = torch.zeros_like(prob_TE).scatter(1, experts_TK, 1.0).detach()
    z_T1 = torch.logsumexp(logits_TE, dim=-1, keepdim=True).square()
    ones_T1 = torch.ones_like(z_T1)
    return RouteTopk(
        gates_TK, experts_TK, total(chosen_TE), total(prob_TE), total(z_T1)[:, 0], total(ones_T1).detach()[:, 0]
    )


class Router(nn.Module):
    """One row of weights an expert, stored by expert id: adding an expert adds a tensor and reshapes none.

    Computes in fp32 also where the stream is narrower. A modality's forbidden experts get -inf before the softmax.
    """

    allowed_ME: torch.Tensor

    def __init__(self, dim: int, ids: Sequence[str], allowed_ME: torch.Tensor, *, top_k: int, kind: str = "softmax"):
        super().__init__()
        if kind not in ROUTERS:
            raise ConfigError(f"router '{kind}' is not known; known are {', '.join(sorted(ROUTERS))}")
        fewest = int(allowed_ME.sum(-1).min())
        if fewest < top_k:
            raise ConfigError(f"model.experts.top_k is {top_k}, but a modality may use only {fewest} routed experts")
        self.rows = nn.ParameterDict({name: nn.Parameter(torch.empty(dim)) for name in ids})
        self.choose, self.top_k = ROUTERS[kind], top_k
        self.register_buffer("allowed_ME", allowed_ME, persistent=False)
        for row in self.rows.values():
            nn.init.normal_(row, std=0.02)

    def forward(self, x_TD: torch.Tensor, modality_T: torch.Tensor) -> RouteTopk:
        """Gates, experts and statistics of the tokens x_TD (T, D) of modalities modality_T (T,) int64."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_ED = torch.stack([row.to(wide) for row in self.rows.values()])
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), weight_ED)
        return self.choose(logits_TE, modality_T, self.allowed_ME, top_k=self.top_k)
