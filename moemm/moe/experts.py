"""The feed-forward networks that experts are. N rows, D width, F hidden width."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from moemm.ops.reference import ACTIVATIONS


class FeedForward(nn.Module):
    """x -> w2 act(w1 x), without biases; (N, D) -> (N, D), N = 0 included.

    w1_FD is (F, D), or (2F, D) for swiglu; w2_DF is (D, F).
    """

    def __init__(self, dim: int, width: int, *, activation: str, num_layers: int = 1):
        super().__init__()
        hidden = 2 * width if activation == "swiglu" else width
        self.w1_FD = nn.Parameter(torch.empty(hidden, dim))
        self.w2_DF = nn.Parameter(torch.empty(dim, width))
        self.activation = ACTIVATIONS[activation]
        nn.init.normal_(self.w1_FD, std=dim**-0.5)
        # The stream adds up 2 x num_layers branches: each starts small enough to keep its variance.
        nn.init.normal_(self.w2_DF, std=width**-0.5 / math.sqrt(2 * num_layers))

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        return F.linear(self.activation(F.linear(x_ND, self.w1_FD)), self.w2_DF)
