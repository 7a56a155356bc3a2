"""DeepSpeed's own configuration, made from ours, and the check of what `deepspeed.extra` adds to it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from moemm.config import deepspeed_keys as keys
from moemm.config.problem import KeyPath, Problem, config_error
from moemm.config.schema import Config
from moemm.config.suggest import did_you_mean
from moemm.errors import ConfigError

BUCKET_SIZE = 2**24
NEVER = 2**31 - 1

USED_AS = {
    "train.batch_size": "train_batch_size; divided by ranks and accumulation: train_micro_batch_size_per_gpu",
    "train.accumulation": "gradient_accumulation_steps",
    "train.clip": "gradient_clipping (always written: DeepSpeed clips at 1.0 if it is not)",
    "train.precision": "bf16.enabled",
    "deepspeed.zero_stage": "zero_optimization.stage",
    "deepspeed.ep_size": "size of its expert-parallel groups; their parameters are its MoE parameters",
    "deepspeed.extra": "merged into DeepSpeed's configuration",
    "deepspeed.timeout_s": "timeout of init_distributed",
    "train.lr": "learning rate of the AdamW that the engine gets",
    "train.betas": "betas of the AdamW that the engine gets",
    "train.weight_decay": "weight decay of the AdamW that the engine gets",
}
"""Key of moemm -> what DeepSpeed does with it."""

_EXTRA: KeyPath = ("deepspeed", "extra")


def deepspeed_section(config: Config, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run on `world_size` ranks.

    No optimizer and no scheduler: the engine is given moemm's AdamW and schedule.
    Raises ConfigError if the batch does not divide over the ranks, or the ranks over `ep_size`.
    """
    require_ranks(config, world_size=world_size)
    train = config.train
    section: dict[str, Any] = {
        "train_batch_size": train.batch_size,
        "train_micro_batch_size_per_gpu": train.batch_size // (train.accumulation * world_size),
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": train.precision == "bf16"},
        "zero_optimization": _zero_section(config.deepspeed.zero_stage),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    return _merged(section, config.deepspeed.extra)


def require_ranks(config: Config, *, world_size: int) -> None:
    """Raises ConfigError for a batch or experts that cannot be dealt out to `world_size` ranks."""
    if world_size < 1:
        raise ConfigError(f"a run needs at least 1 rank, not {world_size}")
    problems = list(check_ranks(config, world_size=world_size))
    if problems:
        raise config_error(problems, name=f"{config.name} on {world_size} ranks")


def check_ranks(config: Config, *, world_size: int) -> Iterator[Problem]:
    """The problems of a batch or of experts that cannot be dealt out to `world_size` ranks, if there are any."""
    train = config.train
    if train.batch_size % (train.accumulation * world_size):
        yield Problem(
            path=("train", "batch_size"),
            message=f"cannot be dealt out to {world_size} ranks x {train.accumulation} accumulation steps",
            given=train.batch_size,
            allowed=f"a multiple of {world_size * train.accumulation}",
        )
    ep_size = config.deepspeed.ep_size
    if world_size % ep_size:
        yield Problem(
            path=("deepspeed", "ep_size"),
            message=f"does not divide the {world_size} ranks of this run, so that some groups would lack experts",
            given=ep_size,
            allowed=", ".join(str(size) for size in range(1, world_size + 1) if world_size % size == 0),
        )


def check_extra(config: Config) -> Iterator[Problem]:
    """Keys of `deepspeed.extra` that DeepSpeed does not know, or that moemm sets."""
    for key, value in config.deepspeed.extra.items():
        message = _top_level(key)
        if message:
            yield Problem(path=(*_EXTRA, key), message=message, given=value)
    yield from _check_section(config, "bf16", _bf16)
    yield from _check_section(config, "zero_optimization", _zero)


def _zero_section(stage: int) -> dict[str, Any]:
    """Buckets of 2^24 elements: DeepSpeed's default of 5e8 sets gigabytes aside, however small the model is."""
    section: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        section |= {"reduce_bucket_size": BUCKET_SIZE, "contiguous_gradients": True}
    if stage in (1, 2):
        section |= {"allgather_bucket_size": BUCKET_SIZE, "reduce_scatter": True}
    if stage == 3:
        section |= {"stage3_prefetch_bucket_size": BUCKET_SIZE}
    return section


def _top_level(key: str) -> str | None:
    if key in keys.PASSED:
        return None
    if key in keys.OWNED:
        return f"is set by moemm; use {keys.OWNED[key]}"
    if key in keys.UNUSED:
        return f"is not for moemm: {keys.UNUSED[key]}"
    if key in keys.REMOVED:
        return "was removed from DeepSpeed"
    return f"DeepSpeed has no such key{did_you_mean(key, keys.PASSED | keys.OWNED.keys())}"


def _check_section(config: Config, name: str, check: Any) -> Iterator[Problem]:
    section = config.deepspeed.extra.get(name, {})
    if not isinstance(section, dict):
        yield Problem(path=(*_EXTRA, name), message="must be a mapping", given=section)
        return
    for key, value in section.items():
        message = check(config, key)
        if message:
            yield Problem(path=(*_EXTRA, name, key), message=message, given=value)


def _bf16(config: Config, key: str) -> str | None:
    return "is set by moemm; use train.precision" if key == "enabled" else None


def _zero(config: Config, key: str) -> str | None:
    stage = config.deepspeed.zero_stage
    if key in keys.ZERO_OWNED:
        return f"is set by moemm; use {keys.ZERO_OWNED[key]}"
    if key in keys.ZERO_REFUSED:
        return "is deprecated, or for optimizers and checkpoints that moemm does not use"
    if key not in keys.ZERO_PASSED:
        return f"DeepSpeed has no such key{did_you_mean(key, keys.ZERO_PASSED | keys.ZERO_OWNED.keys())}"
    if key.startswith("stage3_") or key == "offload_param":
        return None if stage == 3 else f"needs deepspeed.zero_stage 3, which is {stage}"
    if key in ("offload_optimizer", "offload_param") and _on_nvme(config.deepspeed.extra["zero_optimization"][key]):
        return "puts states on NVMe, which moemm's checkpoints cannot hold; give device: cpu"
    if key == "offload_optimizer" and stage == 0:
        return "needs deepspeed.zero_stage >= 1, which is 0"
    if key == "compute_grad_norm" and config.train.clip > 0:
        return "is what clipping needs; leave it out, or set train.clip to 0"
    return None


def _on_nvme(value: Any) -> bool:
    return isinstance(value, dict) and value.get("device") == "nvme"


def _merged(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else copy.deepcopy(value)
    return merged
