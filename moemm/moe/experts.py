"""The feed-forward networks that experts are. N rows, D width, F hidden width, R rank."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from moemm.ops.reference import ACTIVATIONS

Pair = tuple[torch.Tensor, torch.Tensor]


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

    def weights(self) -> Pair:
        """w1_FD and w2_DF."""
        return self.w1_FD, self.w2_DF

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D)."""
        return F.linear(self.activation(F.linear(x_ND, self.w1_FD)), self.w2_DF)


class LowRank(nn.Module):
    """A change of rank R of both weights of another expert, which is frozen (arXiv:2106.09685); 0 at first."""

    def __init__(self, base: FeedForward, rank: int):
        super().__init__()
        (hidden, dim), width = base.w1_FD.shape, base.w2_DF.shape[1]
        self.down1_RD, self.up1_FR = nn.Parameter(torch.empty(rank, dim)), nn.Parameter(torch.zeros(hidden, rank))
        self.down2_RF, self.up2_DR = nn.Parameter(torch.empty(rank, width)), nn.Parameter(torch.zeros(dim, rank))
        nn.init.normal_(self.down1_RD, std=dim**-0.5)
        nn.init.normal_(self.down2_RF, std=width**-0.5)

    def weights(self, base: Pair) -> Pair:
        """The changed weights; `base`: those of the frozen expert."""
        w1_FD, w2_DF = base
        return w1_FD + self.up1_FR @ self.down1_RD, w2_DF + self.up2_DR @ self.down2_RF
