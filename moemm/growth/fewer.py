"""Routed experts merged into fewer: which are alike, their hidden units matched, then averaged by usage.

D width, F hidden units, N tokens, E experts of a pool, M rows of the expert map.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from moemm.analyze.cluster import agglomerate, cut
from moemm.config import Config, from_dict, to_dict
from moemm.config.schema import ExpertGroupConfig
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError, DataError
from moemm.growth.align import Pair, match_units, merge_pairs, permuted, run_expert
from moemm.growth.soup import weighted_mean
from moemm.models import Model
from moemm.moe import Expert, MoELayer, RouterStats, experts_of_groups

TOKENS = 1024
"""Tokens of a layer and row on which experts are compared, at most."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Experts that may become each other: of one group, for the same modalities and tasks, in the same layers.

    old: ids before; new: ids after, fewer. Where nothing is merged both are equally many.
    """

    old: tuple[Expert, ...]
    new: tuple[Expert, ...]

    @property
    def merges(self) -> bool:
        """Whether it gets fewer."""
        return len(self.new) < len(self.old)

    def layers(self, number: int) -> tuple[int, ...]:
        """Where it stands, in a trunk of `number` layers."""
        return self.old[0].layers if self.old[0].layers is not None else tuple(range(number))


@dataclass(slots=True)
class Seen:
    """What a layer was given: some tokens with the rows of the map that they are of, and each expert's tokens."""

    x_ND: list[torch.Tensor] = field(default_factory=list)
    row_N: list[torch.Tensor] = field(default_factory=list)
    load: dict[str, float] = field(default_factory=dict)

    def keep(self, x_TD: torch.Tensor, row_T: torch.Tensor) -> None:
        """Note tokens of rows of which there are not enough yet."""
        for row in row_T.unique().tolist():
            room = TOKENS - sum(int((own == row).sum()) for own in self.row_N)
            place_N = (row_T == row).nonzero()[: max(0, room), 0]
            self.x_ND.append(x_TD[place_N])
            self.row_N.append(row_T[place_N])


@dataclass(frozen=True, slots=True)
class Cluster:
    """Experts of a layer that become one. orders_F: of each member's hidden units; shares: of each in the mean.

    likeness: the least cosine of two members' outputs. error: the largest change of an output by exchanging hidden
    units alone, relative to it.
    """

    layer: int
    new: str
    members: tuple[str, ...]
    shares: tuple[float, ...]
    orders_F: tuple[torch.Tensor, ...]
    likeness: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, without the orders."""
        return {"layer": self.layer, "expert": self.new, "of": list(self.members), "shares": list(self.shares),
                "likeness": self.likeness, "error": self.error}  # fmt: skip


def plan_fewer(config: Config, model: Model, number: int) -> tuple[Config, list[Pool]]:
    """The configuration with at most `number` experts in each routed group, and what becomes of every expert.

    Raises ConfigError: no routed experts, none that would be merged, a lora expert on one of them, fewer than the
    router wants.
    """
    groups, modalities, layers = config.model.experts.groups, model.map.modalities, config.model.layers
    _check_number(config, number)
    fewer = [replace(g, count=min(g.count, number)) if g.kind == "routed" else g for g in groups]
    before, after = (experts_of_groups(one, modalities, layers) for one in (groups, fewer))
    pools = [pool for old, new in zip(before, after, strict=True) for pool in _pools(old, new)]
    renamed = {old.id: new.id for p in pools if not p.merges for old, new in zip(p.old, p.new, strict=True)}
    for group in groups:
        if group.base is not None and group.base not in renamed:
            raise ConfigError(
                f"--experts {number}: the lora experts of base {group.base} are changes of its weights, which would "
                "not be there any more\n  allowed: runs without lora experts on routed ones\n"
                "  to do: merge a run that has none"
            )
    fewer = [replace(g, base=renamed[g.base]) if g.base is not None else g for g in fewer]
    return _checked(config, fewer, number), pools


def _check_number(config: Config, number: int) -> None:
    if number < 1:
        raise ConfigError(f"--experts {number}: must be at least 1, the number of experts left in each routed group")
    counts = [group.count for group in config.model.experts.groups if group.kind == "routed"]
    if config.model.moe == "dense" or not counts:
        why = "model.moe is dense" if config.model.moe == "dense" else "no group of model.experts.groups is routed"
        raise ConfigError(
            f"--experts {number}: the run has no routed experts to merge: {why}\n"
            "  allowed: runs with a group of kind routed\n  to do: leave --experts out to average several runs"
        )
    if number >= max(counts):
        raise ConfigError(
            f"--experts {number}: the routed groups of the run have {', '.join(map(str, counts))} experts, so that "
            f"none would be merged\n  allowed: 1 to {max(counts) - 1}\n  to do: give fewer"
        )


def _pools(old: Sequence[Expert], new: Sequence[Expert]) -> Iterator[Pool]:
    """The experts of a group, those for the same modalities together."""
    for served in dict.fromkeys(expert.modalities for expert in old):
        yield Pool(*(tuple(e for e in side if e.modalities == served) for side in (old, new)))


def _checked(config: Config, groups: list[ExpertGroupConfig], number: int) -> Config:
    """The configuration with these groups, if a run may have it. Raises ConfigError."""
    model = replace(config.model, experts=replace(config.model.experts, groups=groups))
    try:
        return from_dict(to_dict(replace(config, model=model)), origin=f"the run with --experts {number}")
    except ConfigError as error:
        raise ConfigError(f"--experts {number} does not fit the run: {error}") from None


def look(model: Model, batches: Sequence[PackedBatch]) -> dict[int, Seen]:
    """What the layers with a router were given in these batches: layer -> tokens and loads."""
    layers = model.trunk.routed_layers
    seen = {number: Seen() for number in layers}

    def hook(number: int, args: tuple[Any, ...]) -> None:
        seen[number].keep(args[0].detach(), args[1])

    handles = [ffn.register_forward_pre_hook(lambda _, args, at=at: hook(at, args)) for at, ffn in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                stats = model.eval()(batch).router
                for own, load_E in zip(seen.values(), _loads(stats), strict=True):
                    for expert, load in zip(model.map.of_role("routed"), load_E.tolist(), strict=True):
                        own.load[expert.id] = own.load.get(expert.id, 0.0) + load
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _loads(stats: RouterStats | None) -> torch.Tensor:
    """(L, E) tokens of each routed expert."""
    assert stats is not None, "a model with routed experts has routers"
    return stats.load_LME.sum(1)


def find_clusters(model: Model, pools: Sequence[Pool], seen: Mapping[int, Seen]) -> list[Cluster]:
    """The experts that become one, in each layer for itself. Raises DataError where a pool saw no token."""
    found = []
    for pool in (pool for pool in pools if pool.merges):
        for layer in pool.layers(len(model.trunk.blocks)):
            ffn = model.trunk.blocks[layer].ffn
            assert isinstance(ffn, MoELayer)
            x_ND = _tokens_of(pool, ffn, seen[layer])
            pairs = {e.id: ffn.experts[e.id].weights() for e in pool.old}  # type: ignore[operator]
            like_EE = _likeness(pairs, x_ND, ffn.activation)
            names = [e.id for e in pool.old]
            distance_EE = np.clip(1.0 - like_EE, 0.0, None)
            np.fill_diagonal(distance_EE, 0.0)
            groups = cut(names, agglomerate(names, distance_EE), len(pool.new))
            for new, members in zip(pool.new, groups, strict=True):
                at = [names.index(name) for name in members]
                likeness = float(like_EE[np.ix_(at, at)].min())
                own = {name: pairs[name] for name in members}
                found.append(_cluster(layer, new.id, own, seen[layer].load, x_ND, ffn.activation, likeness))
    return found


def _tokens_of(pool: Pool, ffn: MoELayer, seen: Seen) -> torch.Tensor:
    """(N, D) tokens that may use the pool."""
    serves_M = torch.tensor([pool.old[0].serves(*row) for row in ffn.map.rows])
    x_ND = torch.cat(seen.x_ND)[serves_M[torch.cat(seen.row_N)]]
    if not len(x_ND):
        raise DataError(
            f"no token of the samples may use the experts {', '.join(e.id for e in pool.old)}, so that they cannot be "
            "compared\n  allowed: samples with tokens for every routed group\n  to do: give more with --samples"
        )
    return x_ND


def _likeness(pairs: Mapping[str, Pair], x_ND: torch.Tensor, activation: str) -> np.ndarray:
    """(E, E) cosines of the experts' outputs on the same tokens."""
    with torch.no_grad():
        out_EX = torch.stack([run_expert(pair, x_ND, activation).flatten().double() for pair in pairs.values()])
    unit_EX = out_EX / out_EX.norm(dim=1, keepdim=True).clamp_min(1e-300)
    like_EE: np.ndarray = (unit_EX @ unit_EX.T).clamp(-1.0, 1.0).numpy()
    return (like_EE + like_EE.T) / 2


def _cluster(
    layer: int, new: str, pairs: Mapping[str, Pair], load: Mapping[str, float], x_ND: torch.Tensor, activation: str,
    likeness: float,
) -> Cluster:  # fmt: skip
    """Members with their hidden units in the order of the most used one, and shares by usage."""
    members = tuple(pairs)
    used = [load[name] for name in members]
    shares = tuple(one / sum(used) for one in used) if sum(used) else (1.0 / len(used),) * len(used)
    reference = pairs[members[used.index(max(used))]]
    orders_F = tuple(match_units(reference, pair) for pair in pairs.values())
    errors = [
        relative_change(run_expert(pair, x_ND, activation), run_expert(permuted(pair, order_F), x_ND, activation))
        for pair, order_F in zip(pairs.values(), orders_F, strict=True)
    ]
    return Cluster(layer, new, members, shares, orders_F, likeness, max(errors))


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Length of the difference over that of `before`; 0 where both are 0."""
    difference = float((after.detach().double() - before.detach().double()).norm())
    return difference / max(float(before.detach().double().norm()), 1e-300)


def permuted_weights(weights: Mapping[str, torch.Tensor], clusters: Sequence[Cluster]) -> dict[str, torch.Tensor]:
    """The weights with hidden units exchanged as for merging, and nothing merged."""
    made = dict(weights)
    for cluster in clusters:
        for member, order_F in zip(cluster.members, cluster.orders_F, strict=True):
            w1, w2 = (f"trunk.blocks.{cluster.layer}.ffn.experts.{member}.{part}" for part in ("w1_FD", "w2_DF"))
            made[w1], made[w2] = permuted((weights[w1], weights[w2]), order_F)
    return made


def merged_weights(
    weights: Mapping[str, torch.Tensor], pools: Sequence[Pool], clusters: Sequence[Cluster]
) -> dict[str, torch.Tensor]:
    """The weights of the model with fewer experts, under its names. Router rows are averaged as the experts are."""
    of = {(cluster.layer, cluster.new): cluster for cluster in clusters}
    parts = _by_expert(weights)
    made = {name: value for name, value in weights.items() if not any(name in own.values() for own in parts.values())}
    for layer in sorted({layer for layer, _ in parts}):
        for pool in pools:
            for place, new in enumerate(pool.new):
                cluster = of.get((layer, new.id))
                members = cluster.members if cluster is not None else (pool.old[place].id,)
                if (layer, members[0]) in parts:
                    made |= _merged(weights, [parts[layer, name] for name in members], new.id, cluster)
    return made


def _merged(
    weights: Mapping[str, torch.Tensor], parts: Sequence[Mapping[str, str]], new: str, cluster: Cluster | None
) -> dict[str, torch.Tensor]:
    """The tensors of one expert and its router rows, under its new id."""
    if cluster is None:
        return {key.replace(_ID, new): weights[name] for key, name in parts[0].items()}
    made = {
        key.replace(_ID, new): weighted_mean([weights[own[key]] for own in parts], cluster.shares)
        for key in parts[0]
        if ".experts." not in key
    }
    w1, w2 = (f"trunk.blocks.{cluster.layer}.ffn.experts.{_ID}.{part}" for part in ("w1_FD", "w2_DF"))
    orders = zip(parts, cluster.orders_F, strict=True)
    pairs = [permuted((weights[own[w1]], weights[own[w2]]), order_F) for own, order_F in orders]
    made[w1.replace(_ID, new)], made[w2.replace(_ID, new)] = merge_pairs(pairs, cluster.shares)
    return made


_ID = "\0"
"""Stands for the id of an expert in a name: no id holds it."""
_OF_EXPERT = re.compile(
    r"(trunk\.blocks\.(?P<layer>\d+)\.ffn\.(?:experts\.|router\.rows\.[^.]+\.|router\.noise\.|router\.bias_))"
    r"(?P<id>[^.]+)(?P<rest>.*)"
)


def _by_expert(weights: Mapping[str, torch.Tensor]) -> dict[tuple[int, str], dict[str, str]]:
    """(layer, id of a dispatched expert) -> name with _ID for the id -> name, of its tensors and its router rows."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for match in filter(None, map(_OF_EXPERT.fullmatch, weights)):
        key = f"{match[1]}{_ID}{match['rest']}"
        found.setdefault((int(match["layer"]), match["id"]), {})[key] = match[0]
    return found
