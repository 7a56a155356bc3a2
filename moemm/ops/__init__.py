"""The Python face of csrc: what stands around the experts' matrix products.

Without the compiled library the same functions run in plain PyTorch, after one warning; backend_info() tells.
"""

from moemm.ops.backend import backend_info
from moemm.ops.combine import combine
from moemm.ops.grouped_mlp import grouped_mlp
from moemm.ops.moe_ffn import moe_ffn
from moemm.ops.permute import permute
from moemm.ops.plan import Plan, plan
from moemm.ops.route_topk import RouteTopk, route_topk

__all__ = [
    "Plan",
    "RouteTopk",
    "backend_info",
    "combine",
    "grouped_mlp",
    "moe_ffn",
    "permute",
    "plan",
    "route_topk",
]
