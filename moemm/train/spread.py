"""Experts over ranks: which parameters of a model are on some ranks only, and what DeepSpeed must be able to do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from moemm.config import Config
from moemm.distributed import ExpertGroups
from moemm.errors import ConfigError
from moemm.models import Model
from moemm.moe import MoELayer
from moemm.moe.placement import Positions, place_experts


def spread_experts(model: Model, config: Config, groups: ExpertGroups) -> None:
    """Leave a model that has all experts with those of this rank; every rank with the same model calls it.

    To be called when the weights are there and what is not trained is frozen, before the model goes to its device.
    Raises ConfigError for a placement that does not fit the experts, or that DeepSpeed cannot train.
    """
    if groups.size == 1:
        return
    given = config.deepspeed.placement
    layers = [block.ffn for block in model.trunk.blocks if isinstance(block.ffn, MoELayer)]
    placed = place_experts(model.map, ep_size=groups.size, given=given)
    for number, (layer, positions) in enumerate(zip(layers, placed, strict=True)):
        flags = [_trained(layer, positions, position) for position in range(groups.size)] if positions else []
        _check_trained(flags, number)
        if config.deepspeed.zero_stage == 3:
            _check_even(flags, number)
    for layer, positions in zip(layers, placed, strict=True):
        layer.spread(positions, group=groups.exchange, position=groups.position)


def spread_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that only some ranks have, each with the name of what they all belong to: its layer's experts."""
    for name, module in model.named_modules():
        if isinstance(module, MoELayer) and module.is_spread:
            yield from ((f"{name}.experts", parameter) for parameter in module.experts.parameters())


def _trained(layer: MoELayer, positions: Positions, position: int) -> list[bool]:
    """Of each parameter of the experts of a position, in order: whether it is trained."""
    mine = [name for name in layer.experts if positions[name] == position]
    return [parameter.requires_grad for name in mine for parameter in layer.experts[name].parameters()]


def _check_trained(flags: Sequence[Sequence[bool]], layer: int) -> None:
    trained = [any(one) for one in flags]
    if any(trained) and not all(trained):
        raise ConfigError(
            f"deepspeed.ep_size: in layer {layer} the experts of position {trained.index(False)} are all frozen, and "
            f"those of position {trained.index(True)} are not; ranks must have gradients in one order\n"
            "  to do: give each position an expert that is trained (deepspeed.placement), name other tensors in "
            "train.only, or say `deepspeed.ep_size: 1`"
        )


def _check_even(flags: Sequence[Sequence[bool]], layer: int) -> None:
    for position, one in enumerate(flags):
        if len(one) != len(flags[0]):
            raise ConfigError(
                "deepspeed.ep_size: deepspeed.zero_stage is 3, which compares the list of parameters over ranks; but "
                f"in layer {layer} the experts of position 0 have {len(flags[0])} tensors and those of position "
                f"{position} have {len(one)}\n"
                "  to do: change the number of experts so that ep_size divides it, take another deepspeed.placement, "
                "or a stage of 0 to 2, where any number will do"
            )
