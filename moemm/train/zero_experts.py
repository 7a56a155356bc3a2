"""What DeepSpeed must be told of experts that are spread over ranks: private names of DeepSpeed 0.19.8 included.

Gradients of experts are added up over the ranks that hold them and divided by all ranks: each has had the tokens of its
whole group. ZeRO 0, 1 and 2 do that for DeepSpeed's own MoE layers, so the model is given an empty one as a mark. ZeRO
3 refuses these, and does it for what its AutoEP marks. tests/distributed/test_experts.py compares all with one rank.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moemm.config.schema import Config
from moemm.distributed import ExpertGroups, gather_objects
from moemm.errors import ConfigError
from moemm.train.spread import spread_parameters

_BY_SIZE = ("stage3_prefetch_bucket_size", "stage3_max_reuse_distance")
"""Keys by which ZeRO-3 fetches weights earlier, or keeps them longer, as their sizes allow."""


def mark_experts(deepspeed: Any, model: nn.Module, groups: ExpertGroups, *, zero_stage: int) -> None:
    """Say which parameters are experts, and over which ranks; before the optimizer is made. Nothing without groups."""
    if groups.size == 1:
        return
    name = f"ep_size_{groups.size}"
    known = deepspeed.utils.groups
    known._EXPERT_PARALLEL_GROUP[name] = groups.exchange
    known._EXPERT_PARALLEL_GROUP_RANKS[name] = list(groups.exchange_ranks)
    known._EXPERT_DATA_PARALLEL_GROUP[name] = groups.replicas
    known._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = list(groups.replica_ranks)
    for _, parameter in spread_parameters(model):
        marks: dict[str, Any] = {"allreduce": False, "group_name": name}
        if zero_stage == 3:
            marks |= {"ds_zero_placement_family": "autoep_expert", "ds_zero_partition_group_name": name}
            marks |= {"ds_zero_partition_process_group": groups.replicas}
        for key, value in marks.items():
            setattr(parameter, key, value)
    if zero_stage < 3:
        model.add_module("spread_mark", _mark(deepspeed, name, groups.size))


def _mark(deepspeed: Any, name: str, ep_size: int) -> nn.Module:
    """A MoE layer of DeepSpeed's without anything in it."""
    values = {"ep_size": ep_size, "expert_group_name": name, "num_experts": ep_size, "num_local_experts": 1}
    methods = {"__init__": nn.Module.__init__, "set_deepspeed_parallelism": lambda *_, **__: None}
    kind: Any = type("SpreadMark", (deepspeed.moe.layer.MoE,), {**methods, **values})
    mark: nn.Module = kind()
    return mark


def adapt_section(section: dict[str, Any], config: Config, model: nn.Module) -> None:
    """Change DeepSpeed's configuration for a model whose experts are spread; all ranks together. Raises ConfigError."""
    stage = config.deepspeed.zero_stage
    if stage == 0:
        section["gradient_clipping"] = 0.0  # by a norm that is a mean over ranks: the engine clips by the real one
    sizes = [tuple(parameter.shape) for _, parameter in spread_parameters(model)]
    if stage < 3 or all(one == sizes for one in gather_objects(sizes)):
        return
    # Ranks would fetch ahead by the sizes of their own experts, and so gather different weights at the same time.
    zero = section["zero_optimization"]
    for key in _BY_SIZE:
        if config.deepspeed.extra.get("zero_optimization", {}).get(key):
            raise ConfigError(
                f"deepspeed.extra.zero_optimization.{key}: ranks have experts of different sizes, so that they would "
                "fetch different weights at the same time\n  given: "
                f"{zero[key]}\n  allowed: 0, or a deepspeed.placement that gives every rank experts of the same sizes"
            )
        zero[key] = 0


def adapt_optimizer(optimizer: Any, *, zero_stage: int) -> None:
    """Make ZeRO 1 and 2 reduce experts and the rest in messages of their own, as ZeRO 3 does; check that ranks agree.

    They join gradients of both in one buffer, and send it when it is full: with experts of different number or size
    that is at different places, and gradients of different parameters would be added up. Raises ConfigError.
    """
    if zero_stage in (1, 2) and hasattr(optimizer, "reduce_independent_p_g_buckets_and_remove_grads"):
        _separate(optimizer)
    counts = gather_objects(len(optimizer.fp16_groups) if zero_stage == 3 else len(optimizer.param_groups))
    if len(set(counts)) > 1:
        raise ConfigError(
            f"deepspeed: ranks have different numbers of parameter groups ({counts}), so that they would not meet\n"
            "  to do: raise deepspeed.extra.zero_optimization.sub_group_size, or place experts of equal size"
        )


def _separate(optimizer: Any) -> None:
    add = optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def add_apart(parameter: nn.Parameter, group: int) -> None:
        kind = optimizer.get_param_comm_dtype(parameter)
        bucket = optimizer.ipg_buckets[kind]
        if bucket.params and bucket.has_moe_params != (getattr(parameter, "allreduce", True) is False):
            optimizer.reduce_ipg_grads(comm_dtype=kind)
            if optimizer.contiguous_gradients and optimizer.overlap_comm:
                bucket.index = 1 - bucket.index  # as it does where a buffer is full
        add(parameter, group)

    optimizer.reduce_independent_p_g_buckets_and_remove_grads = add_apart
