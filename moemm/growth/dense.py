"""The rules of upcycling: a dense network's hidden units to the experts of a layer, and all else as it is.

F hidden width, D width, H halves of w1 (2 for swiglu, else 1); U units that are dealt.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moemm.config import Config
from moemm.errors import ConfigError
from moemm.growth.deal import Dealt, Portion, Routes, deal
from moemm.growth.rules import Rule, Tensors, To, match
from moemm.models import Model
from moemm.moe import ExpertMap

Alter = Callable[[torch.Tensor, int, str, str], torch.Tensor]
"""(F, H, D) weights of a copy, the number of units that it holds, its name, and which matrix -> other weights."""
NETWORK = "trunk.blocks.{}.ffn"
_UNTIED = (
    "trunk.blocks.{i}.attention_norm",
    "trunk.blocks.{i}.ffn_norm",
    "trunk.blocks.{i}.attention.qkv",
    "trunk.norm",
)
"""What `model.untie` gives to each modality."""


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """The dense network of one layer: the names of the networks whose units it has, and how many."""

    names: tuple[str, ...]
    units: int


def dense_layers(config: Config, layer_map: ExpertMap, weights: Tensors, *, where: str) -> list[DenseLayer]:
    """The dense network of each layer of a model without routed and modality experts.

    Raises ConfigError where it has some; `where` names the model.
    """
    found = []
    for layer in range(config.model.layers):
        prefix, here = NETWORK.format(layer), layer_map.at_layer(layer)
        others = [expert.id for expert in here.experts if expert.role != "shared"]
        if config.model.moe == "dense":
            names: tuple[str, ...] = (prefix,)
        elif others:
            raise ConfigError(
                f"{where} is sparse already: layer {layer} has {', '.join(others[:6])}\n"
                "  allowed: a run of model.moe: dense, or whose experts are all of kind shared\n"
                "  to do: give --method expand, which makes more routed experts of those that are there"
            )
        else:
            names = tuple(f"{prefix}.shared.{expert.id}" for expert in here.experts)
        found.append(DenseLayer(names, sum(weights[f"{name}.w2_DF"].shape[1] for name in names)))
    return found


def deal_layers(layer_map: ExpertMap, layers: Sequence[DenseLayer], routes: Routes) -> list[Dealt]:
    """What each expert of each layer gets. Raises ConfigError as `deal`."""
    return [deal(layer_map.at_layer(n), layer.units, routes, layer=n) for n, layer in enumerate(layers)]


def network_rules(
    layers: Sequence[DenseLayer], dealt: Sequence[Dealt], model: Model, alter: Alter | None
) -> Iterator[Rule]:
    """The rules of every layer's dense network; `alter`: of the copies in experts that are not shared."""
    halves = 2 if model.config.activation == "swiglu" else 1
    own = model.state_dict()
    for number, (layer, found) in enumerate(zip(layers, dealt, strict=True)):
        prefix = NETWORK.format(number)
        places = {
            name: f"{prefix}.{room}.{name}"
            for name in found.portions
            for room in ("shared", "experts")
            if f"{prefix}.{room}.{name}.w1_FD" in own
        }
        for matrix in ("w1_FD", "w2_DF"):
            targets = [
                To(f"{place}.{matrix}", Units(found.portions[name], matrix, halves, place, _for(place, alter)))
                for name, place in places.items()
            ]
            yield Rule(tuple(f"{name}.{matrix}" for name in layer.names), tuple(targets))


def _for(place: str, alter: Alter | None) -> Alter | None:
    return alter if ".experts." in place else None


@dataclass(frozen=True, slots=True)
class Units:
    """A transform: some hidden units of several networks that stand behind each other, in an expert of any width.

    Units that the expert has more keep the drawn w1, and a w2 of 0. name: of the expert, for what `alter` draws.
    """

    portion: Portion
    matrix: str
    halves: int
    name: str
    alter: Alter | None = None

    def __call__(self, sources: Sequence[torch.Tensor], fresh: torch.Tensor) -> torch.Tensor:
        """w1 (H F, D) or w2 (D, F) of the expert."""
        parts = torch.cat([self._by_unit(source) for source in sources])
        value_FHD = self._by_unit(fresh.float()).clone()
        chosen = parts[self.portion.first : self.portion.last].float()
        if self.matrix == "w2_DF":
            value_FHD.zero_()
            chosen = chosen * self.portion.scale
        value_FHD[: self.portion.count] = chosen
        if self.alter is not None:
            value_FHD = self.alter(value_FHD, self.portion.count, self.name, self.matrix)
        if self.matrix == "w2_DF":
            return value_FHD[:, 0].T
        return value_FHD.transpose(0, 1).flatten(0, 1)

    def _by_unit(self, weight: torch.Tensor) -> torch.Tensor:
        """(F, H, D)."""
        if self.matrix == "w2_DF":
            return weight.T[:, None]
        return weight.unflatten(0, (self.halves, -1)).transpose(0, 1)


def other_rules(source: Tensors, target: Tensors) -> Iterator[Rule]:
    """All else: as it is; what one part is in the source and many in the target goes to each of them."""
    for part in _UNTIED:
        plain, many = f"{part}.weight", f"{part}.members.{{member}}.weight"
        if _any(plain, source) and not _any(plain, target) and _any(many, target):
            yield Rule((plain,), (To(many),))
    yield Rule(("{rest*}",), (To("{rest*}"),))
    yield Rule((), (To("trunk.blocks.{i}.ffn.router.{rest*}"),), "the source has no router")


def _any(pattern: str, tensors: Tensors) -> bool:
    return any(match(pattern, name) is not None for name in tensors)


def tie_router_rows(weights: dict[str, torch.Tensor], dealt: Sequence[Dealt]) -> int:
    """Give the routed experts of a group the router rows of the first of them, in place; how many groups there are."""
    for layer, found in enumerate(dealt):
        prefix = f"{NETWORK.format(layer)}.router."
        for first, *others in found.twins:
            for name in [name for name in weights if name.startswith(prefix) and name.endswith(f".{first}")]:
                for other in others:
                    weights[f"{name.removesuffix(first)}{other}"] = weights[name].clone()
    return sum(len(found.twins) for found in dealt)


def seeded(*words: object) -> torch.Generator:
    """Draws that depend on these words alone, the same on every machine."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, words)).encode()))


def noisy(share: float, seed: int) -> Alter:
    """Gaussian noise on every copy; its deviation is a share of that of the copy's matrix."""

    def alter(value_FHD: torch.Tensor, units: int, name: str, matrix: str) -> torch.Tensor:
        held = value_FHD[:units]
        noise = torch.randn(held.shape, generator=seeded(seed, name, matrix))
        return torch.cat([held + noise * (share * held.std(correction=0)), value_FHD[units:]])

    return alter


def dropped(share: float, seed: int) -> Alter:
    """Drop-upcycling (arXiv:2502.19261): some units of each copy, others in each, are drawn anew, in w1 and w2 alike,
    with the mean and the deviation of what they were.
    """  # fmt: skip

    def alter(value_FHD: torch.Tensor, units: int, name: str, matrix: str) -> torch.Tensor:
        chosen = torch.randperm(units, generator=seeded(seed, name))[: round(share * units)]
        if not len(chosen):
            return value_FHD
        old = value_FHD[chosen]
        drawn = torch.randn(old.shape, generator=seeded(seed, name, matrix))
        mean, deviation = old.mean((0, 2), keepdim=True), old.std((0, 2), correction=0, keepdim=True)
        return value_FHD.index_copy(0, chosen, mean + deviation * drawn)

    return alter


def told(layers: Sequence[DenseLayer], dealt: Sequence[Dealt], layer_map: ExpertMap) -> list[str]:
    """What was dealt, for the user: a line for each layer, layers that are alike as one."""
    found: dict[str, list[int]] = {}
    for number, (layer, one) in enumerate(zip(layers, dealt, strict=True)):
        found.setdefault(_told(layer, one, layer_map.at_layer(number)), []).append(number)
    return [f"layer{'s' if len(n) > 1 else ''} {', '.join(map(str, n))}: {line}" for line, n in found.items()]


def _told(layer: DenseLayer, dealt: Dealt, here: ExpertMap) -> str:
    parts, empty = [], 0
    for role, what in (("shared", "shared"), ("hard", "by modality"), ("routed", "routed")):
        own = [(dealt.portions[e.id], e) for e in here.experts if e.role == role and e.id in dealt.portions]
        shards = {(p.first, p.last) for p, _ in own if p.count}
        empty += sum(e.width - p.count for p, e in own)
        if own:
            held = len(set().union(*(range(*shard) for shard in shards))) if shards else 0
            parts.append(f"{held} {what} in {len(own)} expert{'s' if len(own) > 1 else ''}")
    more = f"; {empty} hidden units are new, with w2 = 0" if empty else ""
    return f"{layer.units} hidden units of the dense network: {', '.join(parts)}{more}"
