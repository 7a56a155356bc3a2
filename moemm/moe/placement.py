"""Which rank of an expert-parallel group holds which expert: a position among its ranks for each layer and expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moemm.config.experts import Expert
from moemm.config.suggest import did_you_mean
from moemm.errors import ConfigError
from moemm.moe.expert_map import ExpertMap

Positions = dict[str, int]
"""Of one layer: id of each expert that tokens are sent to -> its position."""


def place_experts(expert_map: ExpertMap, *, ep_size: int, given: Mapping[str, Sequence[int]]) -> list[Positions]:
    """The positions of the dispatched experts of each layer of a trunk; of none in a layer that sends no tokens.

    given: `deepspeed.placement`. Empty: each layer deals its experts out in turn, beginning one rank further than the
    layer before; a lora expert is where its base is.
    Raises ConfigError for ids that are unknown or left out, for a lora expert that is not with its base, and where a
    rank would have no expert of a layer.
    """
    layers = [dispatched(expert_map.at_layer(layer)) for layer in range(expert_map.num_layers)]
    _check_ids(layers, given)
    found = [
        _given(experts, given, layer) if given else _in_turn(experts, ep_size, first=layer)
        for layer, experts in enumerate(layers)
    ]
    for layer, (experts, positions) in enumerate(zip(layers, found, strict=True)):
        _check_bases(experts, positions, layer)
        _check_ranks(positions, layer, ep_size)
    return found


def dispatched(layer_map: ExpertMap) -> tuple[Expert, ...]:
    """The experts of a layer that tokens are sent to and that compute something: hard ones first, then routed ones."""
    experts = (*layer_map.of_role("hard"), *layer_map.of_role("routed"))
    return tuple(expert for expert in experts if expert.kind != "zero")


def _in_turn(experts: Sequence[Expert], ep_size: int, *, first: int) -> Positions:
    ids = {expert.id for expert in experts}
    alone = [expert.id for expert in experts if expert.base not in ids]
    positions = {name: (first + number) % ep_size for number, name in enumerate(alone)}
    return {e.id: positions[e.base if e.base is not None and e.base in ids else e.id] for e in experts}


def _given(experts: Sequence[Expert], given: Mapping[str, Sequence[int]], layer: int) -> Positions:
    return {e.id: given[e.id][layer if len(given[e.id]) > 1 else 0] for e in experts}


def _check_ids(layers: Sequence[Sequence[Expert]], given: Mapping[str, Sequence[int]]) -> None:
    if not given:
        return
    known = list(dict.fromkeys(expert.id for experts in layers for expert in experts))
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(
            f"deepspeed.placement: no expert that is spread is called {unknown[0]}{did_you_mean(unknown[0], known)}\n"
            f"  allowed: {', '.join(known)}"
        )
    missing = [name for name in known if not given.get(name)]
    if missing:
        raise ConfigError(
            f"deepspeed.placement says nothing of {', '.join(missing)}\n"
            "  to do: give each of these a position, or leave `placement` out"
        )


def _check_bases(experts: Sequence[Expert], positions: Positions, layer: int) -> None:
    for expert in experts:
        base = positions.get(expert.base or "")
        if base is not None and base != positions[expert.id]:
            raise ConfigError(
                f"deepspeed.placement: in layer {layer} the lora expert {expert.id} is at position "
                f"{positions[expert.id]}, and its base {expert.base}, whose weights it needs, at {base}\n"
                "  to do: give both one position"
            )


def _check_ranks(positions: Positions, layer: int, ep_size: int) -> None:
    idle = [position for position in range(ep_size) if position not in positions.values()]
    if positions and idle:
        raise ConfigError(
            f"deepspeed.ep_size is {ep_size}, but in layer {layer} position {idle[0]} would have no expert: there are "
            f"{len(positions)} to spread ({', '.join(positions)})\n"
            "  to do: take a smaller ep_size, more experts in each layer, or a placement that uses every position"
        )
