"""Rules across the keys of `harmonize`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moemm.config.problem import KeyPath, Problem
from moemm.config.schema import Config, HarmonizeConfig

ROOT: KeyPath = ("harmonize",)
_TRAPS = (
    ("data_types",),
    ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "offload_param"),
    ("zero_optimization", "round_robin_gradients"),
)
"""Keys of `deepspeed.extra` with which a gradient is elsewhere, in parts, or another's when the engine is asked for it:
with round_robin_gradients DeepSpeed 0.19.8 takes fragments by the order before it reordered the parameters."""
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
    for key, readers in {**_USERS, "at": METHODS[1:], "per": METHODS[1:]}.items():
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
    if given.method == "gradvac" and given.at == "fork" and given.per in (None, "sample", "token"):
        message = "lies on one rank each, and gradvac's averages are over all of them; say `per: batch` or `modality`"
        yield Problem(
            path=(*ROOT, "per"), message=message, given=given.per or "sample", allowed="modality, expert, batch"
        )


def _experts(config: Config) -> Iterator[Problem]:
    if config.harmonize.per == "expert" and config.model.moe == "dense":
        message = "groups tokens by the expert that the last block sent them to, and `model.moe: dense` has none"
        yield Problem(path=(*ROOT, "per"), message=message, given="expert", allowed="sample, token, modality, batch")


def _trunk(config: Config) -> Iterator[Problem]:
    given = config.harmonize
    if given.at != "trunk" or given.method == "sum":
        return
    if given.per not in (None, "batch"):
        message = "is for `harmonize.at: fork`; a parameter's gradient is that of the whole batch, so leave `per` out"
        yield Problem(path=(*ROOT, "per"), message=message, given=given.per, allowed="batch")
    if given.scale == "gradnorm":
        message = "looks at gradients at the fork, and `harmonize.at: trunk` has none"
        yield Problem(path=(*ROOT, "scale"), message=message, given=given.scale, allowed="none, uncertainty, dwa, famo")
    for path in _TRAPS:
        value: object = config.deepspeed.extra
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            message = "keeps gradients where `harmonize.at: trunk` cannot read and write them; leave one of them out"
            yield Problem(path=("deepspeed", "extra", *path), message=message, given=value)


def _schedule(config: Config) -> Iterator[Problem]:
    if config.harmonize.gamma_over is not None and config.harmonize.gamma_start is None:
        message = "has no meaning without `gamma_start`"
        yield Problem(path=(*ROOT, "gamma_over"), message=message, given=config.harmonize.gamma_over)


def _every_block(config: Config) -> Iterator[Problem]:
    given = config.harmonize
    at_fork = given.at == "fork" and given.method != "sum"
    if (at_fork or given.scale == "gradnorm") and config.model.predict_every_block:
        message = (
            "brings losses to every block; the fork sees the gradients of the last alone (`harmonize.at: trunk` all)"
        )
        yield Problem(path=("model", "predict_every_block"), message=message, given=True, allowed="false")


HARMONIZE_RULES: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _unread,
    _unread_scale,
    _kept,
    _experts,
    _trunk,
    _schedule,
    _every_block,
)
