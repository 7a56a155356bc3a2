"""Router kinds: from logits to gates. Each is one small function, registered by name.

T tokens, E routed experts, K slots a token, M rows of the expert map (modalities). `RouteInput` says what a function is
given; it returns RouteTopk (the fused op's result) or a Routing, from which the sums that the losses need are taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from moemm import ops
from moemm.config.entry import load_entry
from moemm.errors import ConfigError
from moemm.moe.stats import sum_by_row
from moemm.ops import RouteTopk
from moemm.ops.reference import even_softmax
from moemm.ops.route_topk import Kind

P, CAPACITY = 0.5, 1.25
"""What `router.p` and `router.capacity` are when not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteInput:
    """What a router function is given.

    logits_TE: (T, E) float32 or float64, of forbidden experts too (`masked` puts -inf there).
    row_T: (T,) int64 row of the expert map; allowed_ME: (M, E) bool; bias_E: (E,) added for choosing only, or None.
    noise_TE: (T, E) > 0, deviation of the noise; of noisy routers while training, else None.
    target_T: (T,) int64 expert that the combination of the sample's modalities is bound to; of combination routers.
    most: of the experts that a token may use, where that is known without asking the device; None: all of them.
    top_k, gates, p, capacity: as in the configuration, with defaults filled in.
    """

    logits_TE: torch.Tensor
    row_T: torch.Tensor
    allowed_ME: torch.Tensor
    top_k: int
    gates: str = "raw"
    p: float = P
    capacity: float = CAPACITY
    bias_E: torch.Tensor | None = None
    noise_TE: torch.Tensor | None = None
    target_T: torch.Tensor | None = None
    most: int | None = None

    @property
    def masked(self) -> torch.Tensor:
        """(T, E) logits, -inf where the token may not use the expert."""
        return self.logits_TE.masked_fill(~self.allowed_ME[self.row_T], -torch.inf)


class Routing(NamedTuple):
    """gates_TK floating; experts_TK int64, -1 for a slot without expert; prob_TE what the gates were taken from.

    smooth_TE: (T, E) how likely each expert was to be chosen, differentiable; None where the router has no such thing.
    binding_T: (T,) cross entropy to the token's bound expert, or None.
    dropped_T: (T,) number of slots lost to capacity, or None.
    """

    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    prob_TE: torch.Tensor
    smooth_TE: torch.Tensor | None = None
    binding_T: torch.Tensor | None = None
    dropped_T: torch.Tensor | None = None


class Routed(NamedTuple):
    """A router's answer with the sums of every loss: RouteTopk's fields, then those that few kinds have, else None.

    entropy_M: sum of the entropies of the tokens' probabilities. smooth_ME, binding_M, dropped_M: sums of Routing's.
    """

    topk: RouteTopk
    entropy_M: torch.Tensor | None = None
    smooth_ME: torch.Tensor | None = None
    binding_M: torch.Tensor | None = None
    dropped_M: torch.Tensor | None = None


RouterFunction = Callable[[RouteInput], RouteTopk | Routing]


@dataclass(frozen=True, slots=True)
class RouterKind:
    """A function, and what it wants: logits that are minus distances, a learned deviation of noise, weights at all."""

    function: RouterFunction
    distance: bool = False
    noisy: bool = False
    learned: bool = True


ROUTERS: dict[str, RouterKind] = {}
"""Name -> kind. moemm's own are below; `register_router` adds others."""


def register_router(
    name: str, *, distance: bool = False, noisy: bool = False, learned: bool = True
) -> Callable[[RouterFunction], RouterFunction]:
    """Make a function RouteInput -> Routing known as `model.router.kind: name`; raises ConfigError for a name taken."""

    def add(function: RouterFunction) -> RouterFunction:
        if name in ROUTERS:
            raise ConfigError(f"router '{name}' is registered twice; give {function.__module__} another name")
        ROUTERS[name] = RouterKind(function, distance, noisy, learned)
        return function

    return add


def find_router(name: str) -> RouterKind:
    """The router of this name, an installed package's too (entry point `moemm.routers`). Raises ConfigError."""
    if name not in ROUTERS:
        load_entry("router", name, ROUTERS)  # registers it
    if name not in ROUTERS:
        known = ", ".join(sorted(ROUTERS))
        raise ConfigError(f"model.router.kind is {name}; known are {known}, and what register_router adds")
    return ROUTERS[name]


def route(kind: RouterKind, given: RouteInput, *, entropy: bool) -> Routed:
    """Calls a router function and takes all sums; entropy: that of each token's probabilities too."""
    found = kind.function(given)
    sums: dict[str, torch.Tensor | None] = {}
    if isinstance(found, Routing):
        extras = {"smooth_ME": found.smooth_TE, "binding_M": found.binding_T, "dropped_M": found.dropped_T}
        sums = {name: None if values is None else _sum(values, given) for name, values in extras.items()}
        topk = _with_sums(found, given)
    else:
        topk = found
    if entropy:
        prob_TE = even_softmax(given.masked)
        sums["entropy_M"] = _sum(torch.special.entr(prob_TE).sum(-1), given)
    return Routed(topk, **sums)


@register_router("softmax")
def softmax(given: RouteInput) -> RouteTopk:
    """Softmax over the allowed experts, then the top k (GShard, Switch). With renormalised gates: top k, then softmax
    (Mixtral), which is the same."""
    return _fused(given, "softmax")


@register_router("sigmoid")
def sigmoid(given: RouteInput) -> RouteTopk:
    """Each expert scored by itself (DeepSeek-V3); with `bias_rate`, balanced without a loss."""
    return _fused(given, "sigmoid")


@register_router("laplace", distance=True)
def laplace(given: RouteInput) -> RouteTopk:
    """Softmax over minus the distances between token and expert, then the top k (FuseMoE)."""
    return _fused(given, "softmax")


@register_router("noisy", noisy=True)
def noisy(given: RouteInput) -> Routing:
    """Gaussian noise of a learned deviation on the logits while training, then softmax top k (arXiv:1701.06538)."""
    logits_TE = given.logits_TE
    if given.noise_TE is not None:
        logits_TE = logits_TE + torch.randn_like(logits_TE) * given.noise_TE
    shaken = replace(given, logits_TE=logits_TE)
    topk, masked_TE = _fused(shaken, "softmax"), shaken.masked
    smooth_TE = None if given.noise_TE is None else _smooth_load(given, masked_TE)
    return Routing(topk.gates_TK, topk.experts_TK, even_softmax(masked_TE), smooth_TE)


@register_router("top_p")
def top_p(given: RouteInput) -> Routing:
    """The fewest experts that together hold probability p (arXiv:2403.07652), at most top_k."""
    prob_TE = even_softmax(given.masked)
    prob_TK, experts_TK = _top(prob_TE, given)
    before_TK = prob_TK.cumsum(-1) - prob_TK
    return Routing(*_keep(prob_TK, experts_TK, before_TK < given.p, given), prob_TE)


@register_router("hard", learned=False)
def hard(given: RouteInput) -> Routing:
    """All allowed experts, averaged (SkillNet, HighMMT). It has no weights, and nothing to learn."""
    allowed_TE = given.allowed_ME[given.row_T]
    prob_TE = allowed_TE / allowed_TE.sum(-1, keepdim=True).to(given.logits_TE.dtype)
    prob_TK, experts_TK = _top(prob_TE, given)
    return Routing(prob_TK, experts_TK.masked_fill(prob_TK == 0, -1), prob_TE)


@register_router("expert_choice")
def expert_choice(given: RouteInput) -> Routing:
    """Each expert takes the tokens that want it most, as many as its capacity (arXiv:2202.09368).

    A token may end with no expert or with many. K is the largest number of experts that a token may use.
    """
    prob_TE = even_softmax(given.masked)
    wide_MK = given.allowed_ME.int().sort(dim=1, descending=True, stable=True).indices[:, : given.most]
    experts_TK = wide_MK.masked_fill(~given.allowed_ME.gather(1, wide_MK), -1)[given.row_T]
    prob_TK = prob_TE.gather(1, experts_TK.clamp_min(0)) * (experts_TK >= 0)
    # Stable sorts and not topk: which of two equal tokens is taken must not depend on the machine.
    order_X = prob_TK.detach().flatten().sort(descending=True, stable=True).indices
    order_X = order_X[experts_TK.flatten()[order_X].sort(stable=True).indices]
    count_E = torch.bincount(experts_TK.flatten() + 1, minlength=prob_TE.shape[1] + 1)
    first_X = (count_E.cumsum(0) - count_E)[experts_TK.flatten()[order_X] + 1]
    place_X = torch.arange(order_X.shape[0], device=order_X.device) - first_X
    rank_TK = torch.empty_like(order_X).scatter(0, order_X, place_X).view_as(experts_TK)
    chosen_TK = (experts_TK >= 0) & (rank_TK < _capacity(given)[experts_TK.clamp_min(0)])
    return Routing(prob_TK * chosen_TK, experts_TK.masked_fill(~chosen_TK, -1), prob_TE)


@register_router("batch_priority")
def batch_priority(given: RouteInput) -> Routing:
    """Softmax top k under a capacity: the surest tokens first (V-MoE, LIMoE); slots that find no room are dropped."""
    prob_TE = even_softmax(given.masked)
    prob_TK, experts_TK = _top(prob_TE, given)
    experts_TK = experts_TK.masked_fill(prob_TK == 0, -1)
    order_T = prob_TK[:, 0].detach().argsort(descending=True, stable=True)
    # All first choices come before any second choice; the plan's rows count up in that order within each expert.
    queue_S1 = experts_TK[order_T].T.reshape(-1, 1)
    plan = ops.plan(queue_S1, num_experts=prob_TE.shape[1])
    place_S1 = plan.inverse_TK - plan.offsets_E1[queue_S1.clamp_min(0)]
    fits_TK = torch.empty_like(experts_TK, dtype=torch.bool)
    fits_TK[order_T] = (place_S1 < _capacity(given)[queue_S1.clamp_min(0)]).view(experts_TK.shape[1], -1).T
    wanted_TK = experts_TK >= 0
    dropped_T = (wanted_TK & ~fits_TK).sum(-1).to(prob_TE.dtype)
    return Routing(*_keep(prob_TK, experts_TK, fits_TK & wanted_TK, given), prob_TE, dropped_T=dropped_T)


@register_router("combination")
def combination(given: RouteInput) -> Routing:
    """Softmax top k whose logits are bound to the expert of the sample's combination of modalities (Flex-MoE)."""
    assert given.target_T is not None
    topk, masked_TE = _fused(given, "softmax"), given.masked
    binding_T = -masked_TE.log_softmax(-1).gather(1, given.target_T[:, None])[:, 0]
    return Routing(topk.gates_TK, topk.experts_TK, even_softmax(masked_TE), binding_T=binding_T)


def _fused(given: RouteInput, kind: Kind) -> RouteTopk:
    found = ops.route_topk(
        given.logits_TE,
        given.row_T,
        given.allowed_ME,
        given.bias_E,
        top_k=given.top_k,
        kind=kind,
        renormalise=given.gates == "renormalised",
    )
    return found._replace(gates_TK=_straight(found.gates_TK)) if given.gates == "straight_through" else found


def _straight(gates_TK: torch.Tensor) -> torch.Tensor:
    """p / stopgrad(p): 1, with the gradient of log p; 0 where the gate is 0."""
    fixed_TK = gates_TK.detach()
    return torch.where(fixed_TK > 0, gates_TK / fixed_TK.clamp_min(torch.finfo(fixed_TK.dtype).tiny), fixed_TK)


def _top(prob_TE: torch.Tensor, given: RouteInput) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k probabilities and their experts, the lower id first among equals."""
    experts_TK = prob_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, : given.top_k]
    return prob_TE.gather(1, experts_TK), experts_TK


def _keep(
    prob_TK: torch.Tensor, experts_TK: torch.Tensor, kept_TK: torch.Tensor, given: RouteInput
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and experts of the slots that are kept; 0 and -1 elsewhere."""
    kept_TK = kept_TK & (prob_TK > 0)
    gates_TK = prob_TK * kept_TK
    if given.gates == "renormalised":
        # One after the other: the sum's bits must not depend on how many slots without an expert stand behind.
        total_T1 = functools.reduce(torch.add, gates_TK.split(1, dim=1))
        gates_TK = gates_TK / total_T1.clamp_min(torch.finfo(gates_TK.dtype).tiny)
    elif given.gates == "straight_through":
        gates_TK = _straight(gates_TK)
    return gates_TK, experts_TK.masked_fill(~kept_TK, -1)


def _capacity(given: RouteInput) -> torch.Tensor:
    """(E,) tokens that an expert takes: a multiple of its even share of the tokens that may use it."""
    allowed_ME = given.allowed_ME.to(given.logits_TE.dtype)
    share_ME = allowed_ME / allowed_ME.sum(-1, keepdim=True)
    return (given.capacity * given.top_k * share_ME[given.row_T].sum(0) - 1e-4).ceil()


def _smooth_load(given: RouteInput, shaken_TE: torch.Tensor) -> torch.Tensor:
    """(T, E) probability that an expert would be among the top k if its noise alone were drawn again."""
    assert given.noise_TE is not None
    k, num_experts = given.top_k, shaken_TE.shape[1]
    allowed_TE = given.allowed_ME[given.row_T]
    if k >= num_experts:
        return allowed_TE.to(shaken_TE.dtype)
    best_TK = shaken_TE.topk(k + 1, dim=-1).values
    inside_TE = shaken_TE >= best_TK[:, k - 1, None]
    bar_TE = torch.where(inside_TE, best_TK[:, k, None], best_TK[:, k - 1, None])
    score_TE = torch.special.ndtr((given.logits_TE - bar_TE) / given.noise_TE)
    return torch.where(allowed_TE, score_TE, 0.0)


def _sum(values: torch.Tensor, given: RouteInput) -> torch.Tensor:
    flat = sum_by_row(values if values.ndim == 2 else values[:, None], given.row_T, given.allowed_ME.shape[0])
    return flat if values.ndim == 2 else flat[:, 0]


def _with_sums(found: Routing, given: RouteInput) -> RouteTopk:
    """The sums that the fused op gives, for functions that do not."""
    gates_TK, experts_TK, prob_TE = found[:3]
    used_TK = (experts_TK >= 0).to(prob_TE.dtype)
    chosen_TE = torch.zeros_like(prob_TE).scatter_add(1, experts_TK.clamp_min(0), used_TK).detach()
    z_T = torch.logsumexp(given.masked, dim=-1).square()
    totals = (chosen_TE, prob_TE, z_T, torch.ones_like(z_T).detach())
    load_ME, prob_ME, z_M, tokens_M = (_sum(values, given) for values in totals)
    return RouteTopk(gates_TK, experts_TK, load_ME, prob_ME, z_M, tokens_M)


def bound_expert(present_BM: torch.Tensor, allowed_ME: torch.Tensor) -> torch.Tensor:
    """(B, M) int64: the expert that tokens of each modality are bound to, by the modalities present in the sample.

    The experts that a modality may use are handed out by a hash of the set of modalities: the same on every machine
    and unmoved by samples, batches and ranks. present_BM (B, modalities) bool; allowed_ME (M, E) bool.
    """
    keys_M = torch.tensor([_scramble(place) for place in range(present_BM.shape[1])], device=present_BM.device)
    code_B = (present_BM * keys_M).sum(1)  # wraps around in 64 bits
    mixed_B = (code_B ^ (code_B >> 29)).abs() >> 7
    rank_BM = mixed_B[:, None] % allowed_ME.sum(1)
    ordered_ME = allowed_ME.int().argsort(dim=1, descending=True, stable=True)
    return ordered_ME.expand(code_B.shape[0], -1, -1).gather(2, rank_BM[:, :, None])[:, :, 0]


def _scramble(place: int) -> int:
    """62 bits that look random, the same everywhere (SplitMix64)."""
    mixed = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) >> 2
