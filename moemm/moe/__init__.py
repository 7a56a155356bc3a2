"""Mixture of experts: the expert map, routers, the experts, and the layer that joins them."""

from moemm.config.experts import Expert, active_experts, experts_of_groups
from moemm.moe.expert_map import ExpertMap
from moemm.moe.experts import FeedForward, LowRank
from moemm.moe.layer import ExpertShape, MoELayer
from moemm.moe.losses import LOSSES, router_loss
from moemm.moe.override import redirected
from moemm.moe.router import Router
from moemm.moe.routers import ROUTERS, RouteInput, Routing, bound_expert, register_router
from moemm.moe.stats import RouterStats
from moemm.moe.without import without_expert

__all__ = [
    "LOSSES",
    "ROUTERS",
    "Expert",
    "ExpertMap",
    "ExpertShape",
    "FeedForward",
    "LowRank",
    "MoELayer",
    "RouteInput",
    "Router",
    "RouterStats",
    "Routing",
    "active_experts",
    "bound_expert",
    "experts_of_groups",
    "redirected",
    "register_router",
    "router_loss",
    "without_expert",
]
