"""From token to gates: which routed experts a token uses, and how much of each.

T tokens, D width, E routed experts, K chosen, M modalities. A router is a function of logits, registered by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from moemm.errors import ConfigError


class Routing(NamedTuple):
    """gates_TK floating, experts_TK int64, prob_TE the probabilities that the gates were taken from."""

    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    prob_TE: torch.Tensor


RouterFunction = Callable[..., Routing]
ROUTERS: dict[str, RouterFunction] = {}


def register_router(name: str) -> Callable[[RouterFunction], RouterFunction]:
    """Make a function (masked logits_TE, top_k=) -> Routing known by name."""

    def add(function: RouterFunction) -> RouterFunction:
        if name in ROUTERS:
            raise ConfigError(f"router '{name}' is registered twice: {ROUTERS[name].__module__}, {function.__module__}")
        ROUTERS[name] = function
        return function

    return add


@register_router("softmax")
def softmax_topk(logits_TE: torch.Tensor, *, top_k: int) -> Routing:
    """Softmax over the allowed experts, then the `top_k` largest, not renormalised.

    Softmax before top-k: a gate then depends on every logit, so the router has a gradient at k = 1 too. (Top-k before
    softmax, and softmax followed by renormalising, give exactly zero there.)
    """
    prob_TE = torch.softmax(logits_TE, dim=-1)
    gates_TK, experts_TK = prob_TE.topk(top_k, dim=-1)
    return Routing(gates_TK, experts_TK, prob_TE)


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

    def forward(self, x_TD: torch.Tensor, modality_T: torch.Tensor) -> tuple[Routing, torch.Tensor]:
        """Routing of each token and z_T, the log-sum-exp of its allowed logits."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        weight_ED = torch.stack([row.to(wide) for row in self.rows.values()])
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), weight_ED)
        allowed_TE = self.allowed_ME[modality_T]
        logits_TE = logits_TE.masked_fill(~allowed_TE, float("-inf"))
        return self.choose(logits_TE, top_k=self.top_k), torch.logsumexp(logits_TE, dim=-1)
