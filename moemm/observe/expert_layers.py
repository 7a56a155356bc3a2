"""Where a model's experts stand and what they weigh, for `moemm inspect` and for the map of `moemm report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from moemm.models import Model
from moemm.moe import ExpertMap, MoELayer


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayers:
    """Layers with the same experts; the sizes are those of one of them, in parameters.

    numbers: of the layers. map: who may use what; None where one dense network stands instead. experts: id -> size, 0
    for experts that compute nothing. router: 0 where there is none. dense: of the network that stands instead, else 0.
    """

    numbers: tuple[int, ...]
    map: ExpertMap | None
    experts: Mapping[str, int]
    router: int
    dense: int


def expert_layers(model: Model) -> list[ExpertLayers]:
    """The layers of a model, those with the same experts together, in the order of the first of each."""
    ffns = [block.get_submodule("ffn") for block in model.trunk.blocks]
    groups: dict[tuple[str, ...], list[int]] = {}
    for number, ffn in enumerate(ffns):
        ids = tuple(expert.id for expert in ffn.map.experts) if isinstance(ffn, MoELayer) else ()
        groups.setdefault(ids, []).append(number)
    return [_describe(ffns[numbers[0]], tuple(numbers)) for numbers in groups.values()]


def _describe(ffn: nn.Module, numbers: tuple[int, ...]) -> ExpertLayers:
    if not isinstance(ffn, MoELayer):
        return ExpertLayers(numbers=numbers, map=None, experts={}, router=0, dense=num_parameters(ffn))
    networks: dict[str, nn.Module] = {**ffn.shared, **ffn.experts}
    sizes = {e.id: num_parameters(networks[e.id]) if e.id in networks else 0 for e in ffn.map.experts}
    router = num_parameters(ffn.router) if ffn.router is not None else 0
    return ExpertLayers(numbers=numbers, map=ffn.map, experts=sizes, router=router, dense=0)


def num_parameters(module: nn.Module) -> int:
    """Elements of all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def layers_title(numbers: Sequence[int]) -> str:
    """`layer 0`, `layers 0, 1`."""
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
