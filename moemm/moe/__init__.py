"""Mixture of experts: the expert map, the router, the experts, and the layer that joins them."""

from moemm.moe.expert_map import Expert, ExpertMap
from moemm.moe.experts import FeedForward
from moemm.moe.layer import ExpertShape, MoELayer
from moemm.moe.losses import router_loss
from moemm.moe.router import ROUTERS, Router, Routing, register_router
from moemm.moe.stats import RouterStats

__all__ = [
    "ROUTERS",
    "Expert",
    "ExpertMap",
    "ExpertShape",
    "FeedForward",
    "MoELayer",
    "Router",
    "RouterStats",
    "Routing",
    "register_router",
    "router_loss",
]
