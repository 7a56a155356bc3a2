"""Who runs a layer's dispatched experts: the values of model.experts.backend.

T tokens, D width, K slots a token, R rows, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from moemm import ops
from moemm.config.schema import ExpertsBackend
from moemm.errors import ConfigError
from moemm.moe import megablocks
from moemm.ops import reference
from moemm.ops.grouped_mlp import Activation, can_group, grouped_products

Weights = Sequence[torch.Tensor]


class RunExperts(Protocol):
    """From tokens, gates and expert ids to residual + gated sum of the experts' outputs, as moemm.ops.moe_ffn does."""

    def __call__(
        self,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        w1: Weights,
        w2: Weights,
        *,
        residual_TD: torch.Tensor | None = None,
        activation: Activation,
    ) -> torch.Tensor:
        """(T, D) -> (T, D)."""


def run_in_torch(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    w1: Weights,
    w2: Weights,
    *,
    residual_TD: torch.Tensor | None = None,
    activation: Activation,
) -> torch.Tensor:
    """Plain PyTorch on any device: argsort, index_select, and grouped_mm where weights allow, else a loop."""
    _, offsets_E1, order_R, inverse_TK = reference.plan(experts_TK, num_experts=len(w1))
    x_RD = reference.permute(x_TD, order_R, inverse_TK)
    products = grouped_products if len(order_R) and can_group(w1, w2, [], []) else reference.grouped_mlp
    y_RD = products(x_RD, offsets_E1, w1, w2, activation=activation)
    return reference.combine(y_RD, inverse_TK, gates_TK, residual_TD)


def expert_runner(name: ExpertsBackend, *, widths: Sequence[int]) -> RunExperts:
    """The function behind a value of model.experts.backend; `widths`: the hidden units of the dispatched experts.

    Raises ConfigError for another name, and for what megablocks cannot take; KernelError where megablocks cannot run.
    """
    runners: dict[str, RunExperts] = {"auto": ops.moe_ffn, "torch": run_in_torch, "megablocks": megablocks.run_experts}
    if name not in runners:
        raise ConfigError(f"model.experts.backend is {name!r}; allowed are {', '.join(runners)}.")
    if name == "megablocks":
        megablocks.check(widths=widths)
    return runners[name]
