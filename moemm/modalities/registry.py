"""Kind -> tokenizer: what is built in, and what others add by decorator or by the entry point `moemm.modalities`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable

from moemm.config.entry import load_entry
from moemm.errors import ConfigError
from moemm.modalities.base import Tokenizer

KINDS: dict[str, type[Tokenizer]] = {}
FALLBACK = "features"


def register_modality(*kinds: str) -> Callable[[type[Tokenizer]], type[Tokenizer]]:
    """Make a tokenizer known by one or more kinds. A kind that is taken, and what is no tokenizer, is an error."""

    def add(tokenizer: type[Tokenizer]) -> type[Tokenizer]:
        _check(kinds, tokenizer)
        for kind in kinds:
            KINDS[kind] = tokenizer
        return tokenizer

    return add


def _check(kinds: tuple[str, ...], tokenizer: type[Tokenizer]) -> None:
    if not kinds or not all(isinstance(kind, str) and kind for kind in kinds):
        raise ConfigError('register_modality: no kind is given; write @register_modality("radar")')
    if not (isinstance(tokenizer, type) and issubclass(tokenizer, Tokenizer)):
        raise ConfigError(f"modality kind '{kinds[0]}': {tokenizer!r} is no subclass of moemm.modalities.Tokenizer")
    lacks = ", ".join(sorted(tokenizer.__abstractmethods__))
    if lacks:
        raise ConfigError(f"modality kind '{kinds[0]}': {tokenizer.__name__} does not define {lacks}")
    for kind in kinds:
        known = KINDS.get(kind)
        if known is not None and known is not tokenizer:
            raise ConfigError(f"modality kind '{kind}' is registered by both {known} and {tokenizer}; name it apart")


def find_kind(kind: str, *, name: str) -> type[Tokenizer]:
    """The tokenizer of a kind that a run was made with. Raises ConfigError where nothing here registers it."""
    if not _known(kind):
        raise ConfigError(
            f"modality '{name}' is of kind '{kind}', which nothing registers here; known are {', '.join(sorted(KINDS))}"
            "\n  to do: give the file that registers it with --plugin FILE, or install the package that does"
        )
    return KINDS[kind]


def _known(kind: str) -> bool:
    """Whether the kind is registered, once the package that offers it, if one does, was imported."""
    if kind not in KINDS:
        tokenizer = load_entry("modality", kind, KINDS)
        if tokenizer is not None:
            register_modality(kind)(tokenizer)
    return kind in KINDS


def tokenizer_class(kind: str, *, name: str, chosen: bool) -> tuple[str, type[Tokenizer]]:
    """The kind that serves `kind`, and its tokenizer.

    A kind from a file that nobody registered is served by `features`, with a warning; one that the user wrote
    (`chosen`) must exist, else ConfigError.
    """
    if _known(kind):
        return kind, KINDS[kind]
    near = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f" (nearest: {near[0]})" if near else ""
    if chosen:
        raise ConfigError(f"modalities.{name}.kind: '{kind}' is not known{hint}; known are {', '.join(sorted(KINDS))}")
    warnings.warn(
        f"modality '{name}' has the kind '{kind}', which is not known{hint}: read as plain features. "
        f"Choose one with modalities.{name}.kind, or write a tokenizer and register it",
        stacklevel=2,
    )
    return FALLBACK, KINDS[FALLBACK]
