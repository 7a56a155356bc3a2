"""Ways to run the experts of a layer on a GPU, all with the same weights. Each is made when its turn comes.

What keeps a way from running is one of failures(); the benchmark writes it beside its row.

T tokens, D width, F expert width, E experts, K slots a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import peers
from moemm import ops
from moemm.errors import KernelError
from moemm.ops.reference import swiglu

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From tokens, gates and expert ids to the layer's output."""


@dataclass
class Weights:
    """w1_EHD (E, 2F, D), the gate's half first, and w2_EDF (E, D, F)."""

    w1_EHD: torch.Tensor
    w2_EDF: torch.Tensor
    top_k: int


@dataclass
class Way:
    """A way to run a layer: its function and the parameters that get gradients."""

    forward: Forward
    parameters: list[torch.Tensor]


def failures() -> tuple[type[Exception], ...]:
    """What a way raises that cannot run here: no such package, another version's interface, no memory or no kernel."""
    known = (ImportError, AssertionError, AttributeError, RuntimeError, TypeError, ValueError, KernelError)
    try:
        from triton.errors import TritonError  # no RuntimeError: code that does not compile, too much shared memory
    except ImportError:
        return known
    return (*known, TritonError)


def _apart(weights: Weights) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One parameter an expert."""
    w1, w2 = ([one.clone().requires_grad_() for one in stacked] for stacked in (weights.w1_EHD, weights.w2_EDF))
    return w1, w2


def dense(weights: Weights) -> Way:
    """The limit: one SwiGLU network of as many FLOPs as a token's experts have."""
    experts, hidden, _ = weights.w1_EHD.shape
    chosen = [e % experts for e in range(weights.top_k)]
    halves = [weights.w1_EHD[chosen, part].flatten(0, 1) for part in (slice(hidden // 2), slice(hidden // 2, None))]
    w1 = torch.cat(halves).requires_grad_()
    w2 = torch.cat(list(weights.w2_EDF[chosen]), dim=1).contiguous().requires_grad_()
    return Way(lambda x, gates, experts: F.linear(swiglu(F.linear(x, w1)), w2), [w1, w2])


def fused(weights: Weights) -> Way:
    """moemm's call."""
    w1, w2 = _apart(weights)
    return Way(lambda x, gates, experts: ops.moe_ffn(x, gates, experts, w1, w2, activation="swiglu"), [*w1, *w2])


def loop(weights: Weights) -> Way:
    """A loop over experts."""
    w1, w2 = _apart(weights)
    return Way(lambda x, gates, experts: peers.loop(x, gates, experts, w1, w2), [*w1, *w2])


def grouped_mm(weights: Weights) -> Way:
    """torch's grouped_mm with argsort and index_select."""
    w1, w2 = weights.w1_EHD.clone().requires_grad_(), weights.w2_EDF.clone().requires_grad_()
    return Way(lambda x, gates, experts: peers.grouped_mm(x, gates, experts, w1, w2), [w1, w2])


def hugging_face(weights: Weights) -> Way:
    """The experts of Mixtral in transformers, by its implementation "grouped_mm"."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, hidden, dim = weights.w1_EHD.shape
    config = MixtralConfig(
        hidden_size=dim, intermediate_size=hidden // 2, num_local_experts=experts, num_experts_per_tok=weights.top_k
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = nn.Parameter(weights.w1_EHD.clone())
    module.down_proj = nn.Parameter(weights.w2_EDF.clone())

    def forward(x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        return module(x_TD, experts_TK, gates_TK.to(x_TD.dtype))

    return Way(forward, list(module.parameters()))


def megablocks(weights: Weights) -> Way:
    """MegaBlocks' dropless layer behind a given routing, by its grouped GEMM."""
    from megablocks.layers.arguments import Arguments
    from megablocks.layers.dmoe import ParallelDroplessMLP

    experts, hidden, dim = weights.w1_EHD.shape
    arguments = Arguments(
        hidden_size=dim,
        ffn_hidden_size=hidden // 2,
        bias=False,
        return_bias=False,
        activation_fn=F.silu,
        moe_num_experts=experts,
        moe_top_k=weights.top_k,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        fp16=False,
        bf16=True,
        device=weights.w1_EHD.device,
    )
    module = ParallelDroplessMLP(arguments)
    with torch.no_grad():
        gate, up = weights.w1_EHD.chunk(2, dim=1)
        module.mlp.w1.copy_(gate.flatten(0, 1))
        module.mlp.v1.copy_(up.flatten(0, 1))
        module.mlp.w2.copy_(weights.w2_EDF.transpose(1, 2).flatten(0, 1))

    def forward(x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        return module(x_TD[:, None], None, gates_TK.to(x_TD.dtype), experts_TK)[:, 0]

    return Way(forward, list(module.parameters()))


def scattermoe(weights: Weights) -> Way:
    """ScatterMoE's Triton kernels (arXiv:2403.08245)."""
    from scattermoe.mlp import GLUMLP

    experts, hidden, dim = weights.w1_EHD.shape
    module = GLUMLP(dim, hidden // 2, experts, weights.top_k).to(weights.w1_EHD)
    with torch.no_grad():  # its first half is the one that is not activated
        module.experts.weight.copy_(torch.cat(weights.w1_EHD.chunk(2, dim=1)[::-1], dim=1))
        module.output_experts.weight.copy_(weights.w2_EDF)

    def forward(x_TD: torch.Tensor, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
        return module(x_TD, gates_TK.to(x_TD.dtype), experts_TK)

    return Way(forward, list(module.parameters()))


WAYS: dict[str, Callable[[Weights], Way]] = {
    "moe_ffn": fused,
    "loop over experts": loop,
    "torch grouped_mm": grouped_mm,
    "Hugging Face": hugging_face,
    "MegaBlocks": megablocks,
    "ScatterMoE": scattermoe,
}
