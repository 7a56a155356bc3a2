"""From E routed experts to m E, k to m k: every expert m times, or as often as its gradient asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from moemm.config import Config
from moemm.config.schema import ExpertGroupConfig
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.growth.dense import NETWORK
from moemm.growth.grown import fresh_model
from moemm.growth.probe import LIMITED, task_loss
from moemm.growth.receipt import Proof
from moemm.growth.rules import Rule, To, Transform, apply_rules, as_it_is
from moemm.growth.upcycling import Made, Start, Wanted, settled
from moemm.models import Model
from moemm.moe import Expert, active_experts, experts_of_groups
from moemm.moe.routers import ROUTERS

Copies = Mapping[str, Sequence[str]]
"""Expert of the source -> its copies in the target, by id."""
_CUT = ("top_p", *LIMITED)
"""Router kinds that may use some copies of an expert and not the others."""


def expand(start: Start, wanted: Wanted, output: Path, batches: Sequence[PackedBatch]) -> Made:
    """m E experts of E. Raises ConfigError: no routed experts, or kinds of which no copies can be made."""
    config, factor = start.config, wanted.factor or 2
    _check(start)
    groups = [replace(g, count=g.count * factor) if _routed(g) else g for g in config.model.experts.groups]
    used = active_experts(config.model.router)
    router = replace(config.model.router, top_k=None if used is None else used * factor)
    model_config = replace(config.model, experts=replace(config.model.experts, groups=groups), router=router)
    train = replace(config.train, output=str(output), init=None)
    new = settled(replace(config, name=f"{config.name}-x{factor}", model=model_config, train=train))
    model = fresh_model(new, start.catalogue, start.specs)
    even = wanted.duplicates != "gradient"
    weight = {} if even else importance(start.model, batches)
    copies = copies_of(config, new, list(start.model.map.modalities), weight)
    rules = list(_rules(start.model, copies, _scale(new, factor)))
    weights, taken = apply_rules(rules, start.weights, model.state_dict())
    model.load_state_dict(weights)
    changed = [f"{sum(map(len, copies.values()))} routed experts of {len(copies)}, top {used} -> {router.top_k}"]
    changed += _told(copies, weight) + taken.lines()
    proofs = [] if even else [Proof(what="most copies of an expert", value=float(max(map(len, copies.values()))))]
    exact = even and router.kind not in _CUT
    details = {"copies": {name: list(made) for name, made in copies.items()}, "importance": dict(weight)}
    return Made(
        config=new, model=model.eval(), changed=changed, exact=exact, details=details, proofs=proofs, rules=rules
    )


def importance(model: Model, batches: Sequence[PackedBatch]) -> dict[str, float]:
    """Routed expert -> sum over its weights and layers of |gradient x weight|, of the tasks' loss on the batches."""
    model.zero_grad(set_to_none=True)
    found = {expert.id: 0.0 for expert in model.map.of_role("routed") if expert.width}
    for batch in batches:
        model.zero_grad(set_to_none=True)
        task_loss(model, [batch]).backward()
        for layer in model.trunk.routed_layers.values():
            for name in [name for name in layer.experts if name in found]:
                parts = [p for p in layer.experts[name].parameters() if p.grad is not None]
                found[name] += sum(float((p.grad * p.detach()).abs().sum()) for p in parts if p.grad is not None)
    model.zero_grad(set_to_none=True)
    return found


def copies_of(config: Config, new: Config, modalities: Sequence[str], weight: Mapping[str, float]) -> Copies:
    """Which experts of the target are copies of which. weight: importance; equally many of each where it is empty."""
    layers = config.model.layers
    pairs = zip(
        experts_of_groups(config.model.experts.groups, modalities, layers),
        experts_of_groups(new.model.experts.groups, modalities, layers),
        strict=True,
    )
    found: dict[str, list[str]] = {}
    for old, made in pairs:
        if len(old) == len(made):
            continue
        factor = len(made) // len(old)
        for served in dict.fromkeys(expert.modalities for expert in old):
            mine = [expert for expert in old if expert.modalities == served]
            room = iter([expert.id for expert in made if expert.modalities == served])
            for expert, number in zip(mine, _numbers(mine, factor, weight), strict=True):
                found[expert.id] = [next(room) for _ in range(number)]
    return found


def _numbers(experts: Sequence[Expert], factor: int, weight: Mapping[str, float]) -> list[int]:
    """Copies of each: at least 1, the others in proportion to importance, by the largest remainders."""
    total = sum(weight.get(expert.id, 0.0) for expert in experts)
    if not total:
        return [factor] * len(experts)
    spare = (factor - 1) * len(experts)
    shares = [spare * weight[expert.id] / total for expert in experts]
    numbers = [int(share) for share in shares]
    order = sorted(range(len(experts)), key=lambda place: numbers[place] - shares[place])
    for place in order[: spare - sum(numbers)]:
        numbers[place] += 1
    return [1 + number for number in numbers]


def _check(start: Start) -> None:
    model, router = start.model, start.config.model.router
    if not model.trunk.routed_layers:
        raise ConfigError(
            f"{start.name} has no routed experts to make more of\n"
            "  allowed: a run with a group of kind routed in model.experts.groups\n"
            "  to do: give --method copy, which makes routed experts of a dense network"
        )
    lora = [expert.id for expert in model.map.experts if expert.kind == "lora"]
    if lora:
        raise ConfigError(
            f"{start.name} has the lora experts {', '.join(lora)}, each tied to one base; no copies can be made of them"
        )
    if router.kind not in ROUTERS:
        raise ConfigError(f"model.router.kind {router.kind} is not known here; import what registers it")


def _routed(group: ExpertGroupConfig) -> bool:
    return group.kind in ("routed", "zero")


def _scale(config: Config, factor: int) -> float:
    """Of w2, against the sum of the gates of the copies of one expert.

    Probabilities of a softmax are shared among copies, and renormalised gates too; what scores each expert by itself,
    or counts each as 1, counts m copies m times.
    """
    router = config.model.router
    alone = router.kind == "sigmoid" and router.gates == "raw"
    return 1.0 / factor if alone or router.gates == "straight_through" else 1.0


def _rules(model: Model, copies: Copies, scale: float) -> Iterator[Rule]:
    """Weights, router rows and biases of every routed expert to its copies, all else as it is."""
    known = set(model.state_dict())
    for number, layer in model.trunk.routed_layers.items():
        prefix = NETWORK.format(number)
        for expert in (e for e in layer.map.of_role("routed") if e.id in copies):
            names = copies[expert.id]
            if expert.width:
                for matrix, change in (("w1_FD", as_it_is), ("w2_DF", _times(scale))):
                    targets = tuple(To(f"{prefix}.experts.{name}.{matrix}", change) for name in names)
                    yield Rule((f"{prefix}.experts.{expert.id}.{matrix}",), targets)
            for place in (one for one in _places(layer.router, prefix) if f"{one}{expert.id}" in known):
                yield Rule((f"{place}{expert.id}",), tuple(To(f"{place}{name}") for name in names))
    yield Rule(("{rest*}",), (To("{rest*}"),))


def _places(router: torch.nn.Module | None, prefix: str) -> list[str]:
    """What stands before an expert's id in the names of the router's tensors."""
    names = [] if router is None else list(router.state_dict())
    own = [f"{name.rpartition('.')[0]}." for name in names if "." in name]
    own += ["bias_"] if any(name.startswith("bias_") for name in names) else []
    return [f"{prefix}.router.{one}" for one in dict.fromkeys(own)]


def _times(scale: float) -> Transform:
    if scale == 1.0:
        return as_it_is

    def times(sources: Sequence[torch.Tensor], fresh: torch.Tensor) -> torch.Tensor:
        return as_it_is(sources, fresh) * scale

    return times


def _told(copies: Copies, weight: Mapping[str, float]) -> list[str]:
    if not weight:
        return []
    total = sum(weight.values()) or 1.0
    ranked = sorted(weight, key=lambda name: -weight[name])
    shares = ", ".join(f"{name} {weight[name] / total:.0%} x {len(copies[name])}" for name in ranked[:12])
    return [f"share of |gradient x weight| and number of copies: {shares}; copies in other numbers change the output"]
