"""Rules across the keys of experts and router."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

from moemm.config.entry import entry_names
from moemm.config.layers import FORMS, parse_layers
from moemm.config.names import modality_names, unknown_modalities
from moemm.config.problem import KeyPath, Problem
from moemm.config.schema import Config, ExpertGroupConfig, RouterConfig
from moemm.config.suggest import did_you_mean, nearest

GROUPS: KeyPath = ("model", "experts", "groups")
ROUTER: KeyPath = ("model", "router")

# Keys of a group, and the kinds that they are for.
_GROUP_KEYS = {
    "width": {"shared", "modality", "routed"},
    "base": {"lora"},
    "rank": {"lora"},
    "modalities": {"modality", "routed", "zero", "lora"},
    "tasks": {"modality", "routed", "zero", "lora"},
    "per_modality": {"modality", "routed", "zero", "lora"},
}
_REQUIRED = {"shared": ("width",), "modality": ("width",), "routed": ("width",), "lora": ("base", "rank"), "zero": ()}

KINDS = (
    "softmax",
    "sigmoid",
    "laplace",
    "noisy",
    "top_p",
    "hard",
    "expert_choice",
    "batch_priority",
    "combination",
)
"""Router kinds that ship with moemm."""
_FUSED = {"softmax", "sigmoid", "laplace", "noisy", "combination"}
# Keys of the router, and the kinds that they are for; of other kinds only what register_router says is known.
_ROUTER_KEYS = {
    "top_k": set(KINDS) - {"hard"},
    "gates": _FUSED | {"top_p", "batch_priority"},
    "p": {"top_p"},
    "capacity": {"expert_choice", "batch_priority"},
    "bias_rate": {"softmax", "sigmoid", "laplace"},
    "scope": set(KINDS) - {"hard"},
}
_LOSS_KINDS = {"load": {"noisy"}, "combination": {"combination"}}


def _groups(config: Config) -> Iterator[Problem]:
    for number, group in enumerate(config.model.experts.groups):
        path = (*GROUPS, number)
        yield from _keys(path, group)
        yield from _served(config, path, group)
        try:
            parse_layers(group.layers, config.model.layers)
        except ValueError as error:
            yield Problem(path=(*path, "layers"), message=str(error), given=group.layers, allowed=FORMS)


def _keys(path: KeyPath, group: ExpertGroupConfig) -> Iterator[Problem]:
    for key, kinds in _GROUP_KEYS.items():
        value = getattr(group, key)
        if value and group.kind not in kinds:
            yield Problem(path=(*path, key), message=f"has no meaning for kind {group.kind}", given=value)
    for key in _REQUIRED[group.kind]:
        if getattr(group, key) is None:
            yield Problem(path=(*path, key), message=f"is missing; kind {group.kind} needs it")


def _served(config: Config, path: KeyPath, group: ExpertGroupConfig) -> Iterator[Problem]:
    tasks = {task.name for task in config.data.tasks}
    given, known = (
        {"modalities": group.modalities, "tasks": group.tasks},
        {
            "modalities": modality_names(config),
            "tasks": tasks,
        },
    )
    unknown = {
        "modalities": unknown_modalities(config, set(group.modalities or ())),
        "tasks": set(group.tasks or ()) - tasks,
    }
    for key, names in given.items():
        for name, count in Counter(names or ()).items():
            if count > 1:
                yield Problem(path=(*path, key), message=f"names {name} {count} times", given=name)
        for name in sorted(unknown[key]):
            what = "which no task has" if key == "modalities" else "which is no task"
            message = f"names {name}, {what}{did_you_mean(name, known[key])}"
            yield Problem(path=(*path, key), message=message, given=name, allowed=", ".join(sorted(known[key])))


def _ids(config: Config) -> Iterator[Problem]:
    given = [group.id for group in config.model.experts.groups]
    for number, name in enumerate(given):
        if name is not None and name in given[:number]:
            message = "is the id of two groups; name them apart"
            yield Problem(path=(*GROUPS, number, "id"), message=message, given=name)


def _router(config: Config) -> Iterator[Problem]:
    router, plain = config.model.router, RouterConfig()
    known = set(KINDS) | entry_names("router")
    if router.kind not in known and not config.plugins and nearest(router.kind, known):
        message = f"no such router{did_you_mean(router.kind, known)}"
        yield Problem(path=(*ROUTER, "kind"), message=message, given=router.kind, allowed=", ".join(sorted(known)))
    for key, kinds in _ROUTER_KEYS.items():
        value = getattr(router, key)
        if router.kind in KINDS and router.kind not in kinds and value != getattr(plain, key):
            allowed = f"with kind {', '.join(sorted(kinds))}"
            message = f"has no meaning for kind {router.kind}"
            yield Problem(path=(*ROUTER, key), message=message, given=value, allowed=allowed)
    for key, kinds in _LOSS_KINDS.items():
        if getattr(router.losses, key) and router.kind in KINDS and router.kind not in kinds:
            message = f"needs model.router.kind {', '.join(kinds)}; with {router.kind} it has no gradient"
            yield Problem(path=(*ROUTER, "losses", key), message=message, given=getattr(router.losses, key))
    if router.losses.min_experts != plain.losses.min_experts and not router.losses.global_entropy:
        message = "has no meaning without `global_entropy`"
        yield Problem(path=(*ROUTER, "losses", "min_experts"), message=message, given=router.losses.min_experts)


def _backend(config: Config) -> Iterator[Problem]:
    model, name = config.model, config.model.experts.backend
    path = ("model", "experts", "backend")
    dispatched = [group for group in model.experts.groups if group.kind not in ("shared", "zero")]
    if name != "auto" and (model.moe == "dense" or not dispatched):
        message = "has nothing to run: there are no modality or routed experts"
        yield Problem(path=path, message=message, given=name, allowed="auto")
        return
    if name != "megablocks":
        return
    if config.train.precision != "bf16":
        message = f"multiplies bfloat16 only, but train.precision is {config.train.precision}"
        yield Problem(path=path, message=message, given=name, allowed="auto, torch, or train.precision: bf16")
    widths = sorted({group.width for group in dispatched if group.width is not None})
    if len(widths) > 1:
        message = f"multiplies experts of one width, but the groups have {', '.join(map(str, widths))}"
        yield Problem(path=path, message=message, given=name, allowed="auto, torch, or equal widths")


def _top_k(config: Config) -> Iterator[Problem]:
    router = config.model.router
    groups = config.model.experts.groups
    routed = [group for group in groups if _is_routed(group)]
    number = sum(group.count for group in routed)
    counted = not any(group.per_modality for group in routed)
    if router.top_k is not None and not routed:
        message = "has no meaning: no group of model.experts.groups is routed"
        yield Problem(path=(*ROUTER, "top_k"), message=message, given=router.top_k)
    elif router.top_k is not None and counted and router.top_k > number:
        message = f"is more than the routed experts of model.experts.groups, which are {number}"
        yield Problem(path=(*ROUTER, "top_k"), message=message, given=router.top_k, allowed=f"1 to {number}")
    if router.gates == "renormalised" and router.top_k in (None, 1) and router.kind in _FUSED | {"batch_priority"}:
        message = "needs top_k of 2 or more: with 1 the gate is always 1 and the router has no gradient"
        yield Problem(path=(*ROUTER, "gates"), message=message, given="renormalised", allowed="raw, straight_through")


def _shares(config: Config) -> Iterator[Problem]:
    model, path = config.model, ("model", "share")
    names = [name for group in model.share for name in group]
    if model.share and not model.untie and not model.latents:
        yield Problem(path=path, message="has no meaning without model.untie or model.latents", given=model.share)
    for name, count in Counter(names).items():
        if count > 1:
            yield Problem(path=path, message=f"names {name} {count} times; a modality has one group", given=name)
    for name in sorted(unknown_modalities(config, set(names))):
        message = f"names {name}, which no task has{did_you_mean(name, modality_names(config))}"
        yield Problem(path=path, message=message, given=name, allowed=", ".join(sorted(modality_names(config))))
    for name, count in Counter(model.untie).items():
        if count > 1:
            yield Problem(path=("model", "untie"), message=f"names {name} {count} times", given=model.untie)
    if model.ordered and model.attention == "nested":
        message = "cannot mask what a token sees, as model.ordered asks for"
        yield Problem(path=("model", "attention"), message=message, given="nested", allowed="auto, padded")
    if model.predict_every_block and model.layers == 1:
        message = "has no meaning for a model of one layer"
        yield Problem(path=("model", "predict_every_block"), message=message, given=True)


def _is_routed(group: ExpertGroupConfig) -> bool:
    if group.kind == "lora":
        return group.modalities is None and group.tasks is None
    return group.kind in ("routed", "zero")


def _extensions(config: Config) -> Iterator[Problem]:
    model, path = config.model, ("model", "extensions")
    names = [one.name for one in model.extensions]
    tasks = {task.name for task in config.data.tasks}
    for key, known in (("name", set(names)), ("modalities", modality_names(config)), ("tasks", tasks)):
        given = names if key == "name" else [name for one in model.extensions for name in getattr(one, key)]
        for name, count in Counter(given).items():
            if count > 1:
                yield Problem(path=path, message=f"have {name} {count} times in `{key}`", given=name)
        unknown = unknown_modalities(config, set(given)) if key == "modalities" else set(given) - known
        for name in sorted(unknown):
            message = f"name {name} in `{key}`, which this run does not have{did_you_mean(name, known)}"
            yield Problem(path=path, message=message, given=name, allowed=", ".join(sorted(known)))
    if any(one.norms for one in model.extensions) and "norms" in model.untie:
        message = "has no meaning with `model.untie: [norms]`: each modality has norms of its own"
        yield Problem(path=path, message=f"`norms` {message}", given=True, allowed="norms: false")
    added = [group.added for group in model.experts.groups]
    for number, (before, now) in enumerate(pairwise([0, *added])):
        where = (*GROUPS, number, "added")
        if now > len(names):
            message = f"is more than the extensions in model.extensions, which are {len(names)}"
            yield Problem(path=where, message=message, given=now, allowed=f"0 to {len(names)}")
        if now < before:
            message = f"stands behind a group of extension {before}; groups stand in the order in which they came"
            yield Problem(path=where, message=message, given=now, allowed=f"{before} and more")


EXPERT_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _groups,
    _ids,
    _backend,
    _router,
    _top_k,
    _shares,
    _extensions,
)
