"""Rules across the keys of the objectives, and of what they learn from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from moemm.config.names import modality_names, unknown_modalities
from moemm.config.problem import KeyPath, Problem
from moemm.config.schema import Config, ContrastiveConfig, ObjectiveConfig, ObjectivesConfig
from moemm.config.suggest import did_you_mean

ROOT: KeyPath = ("objectives",)


def is_on(objective: ObjectiveConfig) -> bool:
    """Whether the objective has a factor at some step."""
    return bool(objective.weight or objective.start)


def label_free(config: ObjectivesConfig) -> tuple[str, ...]:
    """Names of the objectives without labels that are on, in the order of the schema."""
    return tuple(name for name, one in objective_sections(config).items() if name != "supervised" and is_on(one))


def objective_sections(config: ObjectivesConfig) -> dict[str, ObjectiveConfig]:
    """Name -> section of every objective: moemm's in the order of the schema, then those of `own`."""
    return {**{name: one for name, one in vars(config).items() if name != "own"}, **config.own}


def _nothing(config: Config) -> Iterator[Problem]:
    if not is_on(config.objectives.supervised) and not label_free(config.objectives):
        message = "is 0, and so is every other objective's weight; there is nothing to learn"
        yield Problem(path=(*ROOT, "supervised", "weight"), message=message, given=0.0, allowed="one weight above 0")


def _schedules(config: Config) -> Iterator[Problem]:
    for name, one in objective_sections(config.objectives).items():
        if one.start is None and one.over != 1.0:
            message = "has no meaning without `start`"
            path = (*ROOT, "own", name, "over") if name in config.objectives.own else (*ROOT, name, "over")
            yield Problem(path=path, message=message, given=one.over)


def _own(config: Config) -> Iterator[Problem]:
    built_in = [name for name in vars(config.objectives) if name != "own"]
    for name in config.objectives.own:
        path = (*ROOT, "own", name)
        if name in built_in:
            message = f"is an objective that ships with moemm; its section is objectives.{name}"
            yield Problem(path=path, message=message)
        elif not name.isidentifier():
            yield Problem(path=path, message="is no name of an objective", allowed="letters, digits and _")


def _masked(config: Config) -> Iterator[Problem]:
    masked, needed = config.objectives.masked, [n for n in label_free(config.objectives) if n in _MASKING]
    if needed and not masked.ratio and not masked.cross_modal:
        message = f"is 0, and cross_modal too: nothing is hidden for objectives.{needed[0]}"
        yield Problem(path=(*ROOT, "masked", "ratio"), message=message, given=masked.ratio, allowed="above 0, to 1")
    yield from _known(config, (*ROOT, "masked", "modalities"), masked.modalities or [])


def _pairs(config: Config) -> Iterator[Problem]:
    path = (*ROOT, "contrastive", "pairs")
    seen: list[frozenset[str]] = []
    for number, pair in enumerate(config.objectives.contrastive.pairs or []):
        if len(pair) != 2 or pair[0] == pair[1]:
            allowed = "two different modalities"
            yield Problem(path=(*path, number), message="is no pair", given=pair, allowed=allowed)
        elif frozenset(pair) in seen:
            yield Problem(path=(*path, number), message="stands here twice", given=pair)
        seen.append(frozenset(pair))
        yield from _known(config, (*path, number), pair)


def _noise(config: Config) -> Iterator[Problem]:
    given = config.objectives.contrastive
    if given.noisy_pairs != "weigh" and given.noisy_from != ContrastiveConfig().noisy_from:
        message = f"has no meaning with `noisy_pairs: {given.noisy_pairs}`"
        yield Problem(path=(*ROOT, "contrastive", "noisy_from"), message=message, given=given.noisy_from)


def _bags(config: Config) -> Iterator[Problem]:
    given = config.objectives.contrastive
    wanted = is_on(given) and given.loss == "mil_nce"
    for number, task in enumerate(config.data.tasks):
        path: KeyPath = ("data", "tasks", number)
        if task.bags is not None and not wanted:
            message = "has no meaning without `objectives.contrastive` of loss mil_nce"
            yield Problem(path=(*path, "bags"), message=message, given=task.bags)
        if task.together is not None and task.bags is None:
            message = "has no meaning without `bags`, which says what belongs together"
            yield Problem(path=(*path, "together"), message=message, given=task.together)
    if wanted and all(task.bags is None for task in config.data.tasks):
        message = "has no bags: without them it is infonce; say under a task which samples are of one thing"
        allowed = "infonce, siglip; or `bags: group` (or an integer label of the file) under a task"
        yield Problem(path=(*ROOT, "contrastive", "loss"), message=message, given=given.loss, allowed=allowed)


def _latents(config: Config) -> Iterator[Problem]:
    names = label_free(config.objectives)
    if names and config.model.latents:
        message = f"leaves no token to objectives.{names[0]}: latents stand for the tokens of a sample"
        yield Problem(path=("model", "latents"), message=message, given=config.model.latents, allowed="0")


def _missing(config: Config) -> Iterator[Problem]:
    names, kind = label_free(config.objectives), config.model.missing.kind
    if names and kind != "none":
        message = f"stands in for what objectives.{names[0]} learns to tell from the rest; one of the two"
        yield Problem(path=("model", "missing", "kind"), message=message, given=kind, allowed="none")


def _replaced(config: Config) -> Iterator[Problem]:
    replaced = config.objectives.replaced
    if is_on(replaced) and replaced.ratio in (0.0, 1.0):
        message = "leaves nothing to tell apart"
        yield Problem(
            path=(*ROOT, "replaced", "ratio"), message=message, given=replaced.ratio, allowed="between 0 and 1"
        )


def _labels(config: Config) -> Iterator[Problem]:
    if config.data.label_share < 1.0 and not is_on(config.objectives.supervised):
        message = "has no meaning with `objectives.supervised.weight: 0`, which uses no label"
        yield Problem(path=("data", "label_share"), message=message, given=config.data.label_share)


def _init(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.init is not None and os.path.normpath(train.init) == os.path.normpath(train.output):
        message = "is train.output; --resume goes on with a run, train.init begins another one with its weights"
        yield Problem(path=("train", "init"), message=message, given=train.init)


def _known(config: Config, path: KeyPath, names: list[str]) -> Iterator[Problem]:
    known = modality_names(config)
    for name in sorted(unknown_modalities(config, set(names))):
        message = f"names {name}, which no task has{did_you_mean(name, known)}"
        yield Problem(path=path, message=message, given=name, allowed=", ".join(sorted(known)))


_MASKING = ("masked", "similarity")
OBJECTIVE_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _nothing,
    _schedules,
    _own,
    _masked,
    _pairs,
    _noise,
    _bags,
    _latents,
    _missing,
    _replaced,
    _labels,
    _init,
)
