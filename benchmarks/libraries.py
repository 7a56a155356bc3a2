"""Layers of other libraries, with our weights and our routing: what each needs is imported when it is built.

Their routers are left out where the library lets us (Hugging Face, DeepSpeed); Tutel makes its routing from scores.
T tokens, D width, F expert width, E experts, K slots a token, C rows that each expert is padded to.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from moemm.ops.reference import swiglu

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Weights = list[torch.Tensor]
INSTALL = {
    "transformers": "pip install 'transformers>=5.23'",
    "deepspeed": "pip install deepspeed",
    "tutel": "NO_CUDA=1 pip install --no-build-isolation git+https://github.com/microsoft/tutel",
}


def missing(package: str) -> str | None:
    """How to install a package that is not there; None where it is."""
    return None if importlib.util.find_spec(package) else INSTALL[package]


def hugging_face(w1_EHD: torch.Tensor, w2_EDF: torch.Tensor, top_k: int, implementation: str | None) -> Run:
    """Mixtral's experts of transformers. implementation: None for its own loop ("eager"), or "grouped_mm"."""
    modeling = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    sizes = {"num_local_experts": w1_EHD.shape[0], "hidden_size": w1_EHD.shape[2], "intermediate_size": w2_EDF.shape[2]}
    config = modeling.MixtralConfig(**sizes, num_experts_per_tok=top_k)
    config._experts_implementation = implementation or "eager"
    with torch.device("meta"):
        experts = modeling.MixtralExperts(config)
    for name, weight in (("gate_up_proj", w1_EHD), ("down_proj", w2_EDF)):
        delattr(experts, name)  # a parameter cannot be replaced by a leaf that is no Parameter
        setattr(experts, name, weight)
    return lambda x_TD, gates_TK, experts_TK: experts(x_TD, experts_TK, gates_TK)


class _Expert(nn.Module):
    """One expert of DeepSpeed's layer. Its weights are set after the layer has copied it."""

    a: torch.Tensor
    b: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(swiglu(F.linear(x, self.a)), self.b)


class _DrawnGate(nn.Module):
    """Stands where DeepSpeed's TopKGate does: routing that was drawn, and the rows' places, by a cumsum as there."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.drawn: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, *_: Any) -> tuple[Any, ...]:
        assert self.drawn is not None
        gates_TK, experts_TK = self.drawn
        mask_TE = torch.zeros(len(experts_TK), self.num_experts, dtype=torch.bool).scatter_(1, experts_TK, True)
        counts_E = mask_TE.sum(0)
        place_TK = (mask_TE.cumsum(0) - 1).gather(1, experts_TK)
        routes = [one.t().contiguous() for one in (experts_TK.int(), place_TK.int(), gates_TK)]
        return None, counts_E.max(), self.num_experts, *routes, counts_E


def deepspeed(w1: Weights, w2: Weights) -> Run:
    """DeepSpeed's MOELayer of one rank that drops no token: every expert gets as many rows as the fullest."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it looked for another
    sharded_moe = importlib.import_module("deepspeed.moe.sharded_moe")
    experts = importlib.import_module("deepspeed.moe.experts").Experts(_Expert(), len(w1))
    for module, a, b in zip(experts.deepspeed_experts, w1, w2, strict=True):
        module.a, module.b = a, b
    gate = _DrawnGate(len(w1))
    layer = sharded_moe.MOELayer(gate, experts, "one rank", ep_size=1, num_local_experts=len(w1))

    def run(x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        gate.drawn = gates_TK, experts_TK
        return layer(x_TD, None)

    return run


def tutel(w1_EHD: torch.Tensor, w2_EDF: torch.Tensor) -> Run:
    """Tutel's routing from scores, its encode and decode, and batched products over stacked experts between them."""
    moe = importlib.import_module("tutel.moe")
    num_experts = len(w1_EHD)

    def run(x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        scores_TE = gates_TK.new_zeros(len(x_TD), num_experts).scatter(1, experts_TK, gates_TK)
        options = {"loss_fn": None, "capacity_factor": 0, "normalize_gate": False}
        routed, _ = moe.top_k_routing(scores_TE, experts_TK.shape[1], **options)
        h_ECF = swiglu(torch.bmm(moe.fast_encode(x_TD, routed), w1_EHD.transpose(1, 2)))
        return moe.fast_decode(torch.bmm(h_ECF, w2_EDF.transpose(1, 2)), routed)

    return run
