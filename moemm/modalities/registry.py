"""Kind -> tokenizer: what is built in, and what others add by decorator or by the entry point `moemm.modalities`."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points

from moemm.errors import ConfigError
from moemm.modalities.base import Tokenizer

KINDS: dict[str, type[Tokenizer]] = {}
FALLBACK = "features"


def register_modality(*kinds: str) -> Callable[[type[Tokenizer]], type[Tokenizer]]:
    """Make a tokenizer known by one or more kinds. A kind that is taken is an error."""

    def add(tokenizer: type[Tokenizer]) -> type[Tokenizer]:
        for kind in kinds:
            known = KINDS.get(kind)
            if known is not None and known is not tokenizer:
                raise ConfigError(f"modality kind '{kind}' is registered by both {known} and {tokenizer}")
            KINDS[kind] = tokenizer
        return tokenizer

    return add


def tokenizer_class(kind: str, *, name: str, chosen: bool) -> tuple[str, type[Tokenizer]]:
    """The kind that serves `kind`, and its tokenizer.

    A kind from a file that nobody registered is served by `features`, with a warning; one that the user wrote
    (`chosen`) must exist, else ConfigError.
    """
    for entry in entry_points(group="moemm.modalities"):
        if entry.name not in KINDS:
            register_modality(entry.name)(entry.load())
    if kind in KINDS:
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
