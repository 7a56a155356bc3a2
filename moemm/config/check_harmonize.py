"""Rules across the keys of `harmonize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moemm.config.problem import KeyPath, Problem
from moemm.config.schema import Config, HarmonizeConfig

ROOT: KeyPath = ("harmonize",)
METHODS = (
    "sum",
    "realign",
    "curriculum",
    "realign_curriculum",
    "pcgrad",
    "gradvac",
    "cagrad",
    "mgda",
    "imtl_g",
    "nash_mtl",
    "aligned_mtl",
    "upgrad",
    "dual_cone",
    "equal_norm",
    "random",
)
"""Those that moemm brings; others may be registered."""
_USERS = {
    "gamma": ("realign", "curriculum", "realign_curriculum"),
    "gamma_start": ("realign", "curriculum", "realign_curriculum"),
    "gamma_over": ("realign", "curriculum", "realign_curriculum"),
    "strength": ("cagrad", "gradvac"),
}
"""Key -> the methods that read it."""
_SCALE_USERS = {"scale_rate": ("famo", "gradnorm"), "scale_window": ("dwa",), "scale_alpha": ("gradnorm",)}
"""Key -> the scales that read it."""


def _unread(config: Config) -> Iterator[Problem]:
    given, default = config.harmonize, HarmonizeConfig()
    if given.method not in METHODS:
        return  # a method of the user's own may read any of them
    for key, readers in {**_USERS, "per": METHODS[1:]}.items():
        value = getattr(given, key)
        if value != getattr(default, key) and given.method not in readers:
            message = f"has no meaning with `harmonize.method: {given.method}`; it is for {', '.join(readers)}"
            yield Problem(path=(*ROOT, key), message=message, given=value)


def _unread_scale(config: Config) -> Iterator[Problem]:
    given, default = config.harmonize, HarmonizeConfig()
    for key, readers in _SCALE_USERS.items():
        value = getattr(given, key)
        if value != getattr(default, key) and given.scale not in readers:
            message = f"has no meaning with `harmonize.scale: {given.scale}`; it is for {', '.join(readers)}"
            yield Problem(path=(*ROOT, key), message=message, given=value)


def _kept(config: Config) -> Iterator[Problem]:
    given = config.harmonize
    if given.method == "gradvac" and given.per in ("sample", "token"):
        message = "lies on one rank each, and gradvac's averages are over all of them; say `per: batch` or `modality`"
        yield Problem(path=(*ROOT, "per"), message=message, given=given.per, allowed="modality, batch")


def _schedule(config: Config) -> Iterator[Problem]:
    if config.harmonize.gamma_over is not None and config.harmonize.gamma_start is None:
        message = "has no meaning without `gamma_start`"
        yield Problem(path=(*ROOT, "gamma_over"), message=message, given=config.harmonize.gamma_over)


def _every_block(config: Config) -> Iterator[Problem]:
    given = config.harmonize
    if (given.method != "sum" or given.scale == "gradnorm") and config.model.predict_every_block:
        message = "brings losses to every block; `harmonize` sees the gradients of the last alone"
        yield Problem(path=("model", "predict_every_block"), message=message, given=True, allowed="false")


HARMONIZE_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _unread,
    _unread_scale,
    _kept,
    _schedule,
    _every_block,
)
