"""Rules across the keys that spread experts over ranks: `deepspeed.ep_size` and `deepspeed.placement`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moemm.config.problem import KeyPath, Problem
from moemm.config.schema import Config

EP_SIZE: KeyPath = ("deepspeed", "ep_size")
PLACEMENT: KeyPath = ("deepspeed", "placement")
_OFFLOAD = ("offload_optimizer", "offload_param")


def _needed(config: Config) -> Iterator[Problem]:
    given = config.deepspeed
    if given.ep_size == 1:
        if given.placement:
            message = "has no meaning with `deepspeed.ep_size: 1`: every rank has all experts"
            yield Problem(path=PLACEMENT, message=message, given=given.placement)
        return
    dispatched = [group for group in config.model.experts.groups if group.kind not in ("shared", "zero")]
    if config.model.moe == "dense" or not dispatched:
        message = "has nothing to spread: there are no modality or routed experts"
        yield Problem(path=EP_SIZE, message=message, given=given.ep_size, allowed="1")


def _positions(config: Config) -> Iterator[Problem]:
    size, layers = config.deepspeed.ep_size, config.model.layers
    for expert, positions in config.deepspeed.placement.items() if size > 1 else ():
        path = (*PLACEMENT, expert)
        if len(positions) not in (1, layers):
            message = f"has {len(positions)} positions for {layers} layers"
            yield Problem(path=path, message=message, given=positions, allowed=f"1 for all layers, or {layers}")
        if positions and max(positions) >= size:
            message = f"names position {max(positions)} of {size} ranks (deepspeed.ep_size)"
            yield Problem(path=path, message=message, given=positions, allowed=f"0 to {size - 1}")


def _with_others(config: Config) -> Iterator[Problem]:
    if config.deepspeed.ep_size == 1:
        return
    if config.harmonize.at == "trunk":
        message = (
            "compares whole gradients, and with deepspeed.ep_size of more than 1 no rank has those of all experts; "
            "say `at: fork`, or `deepspeed.ep_size: 1`"
        )
        yield Problem(path=("harmonize", "at"), message=message, given="trunk", allowed="fork")
    zero = config.deepspeed.extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return  # another rule says so
    for key in _OFFLOAD:
        if key in zero:
            message = (
                "is not for experts that are spread: moemm has not checked DeepSpeed's gradient norm there; leave it "
                "out, or say `deepspeed.ep_size: 1`"
            )
            yield Problem(path=("deepspeed", "extra", "zero_optimization", key), message=message, given=zero[key])
    if zero.get("reduce_scatter") is False:
        message = "DeepSpeed reduces gradients of experts that are spread with reduce_scatter alone; leave it out"
        yield Problem(path=("deepspeed", "extra", "zero_optimization", "reduce_scatter"), message=message, given=False)


SPREAD_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (_needed, _positions, _with_others)
