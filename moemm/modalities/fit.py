"""From what the files say and the config chooses to specs: options resolved, statistics and vocabularies learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from moemm.config.schema import ModalityConfig
from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import Prepare, Value
from moemm.errors import ConfigError
from moemm.modalities.base import ModalitySpec, Tokenizer
from moemm.modalities.registry import find_kind, tokenizer_class

_NO_OPTIONS = ("kind", "options")
"""Keys of ModalityConfig that are no options of a kind."""


def fit_modalities(
    modalities: Iterable[ModalityInfo],
    config: Mapping[str, ModalityConfig],
    values_of: Callable[[str], Iterable[Value]],
) -> dict[str, ModalitySpec]:
    """A spec for every modality, in order.

    values_of: modality name -> its values in the train splits of all tasks, once each.
    Raises ConfigError for options of a modality that the run lacks, or that its kind does not know.
    """
    infos = list(modalities)
    _check_names(config, [info.name for info in infos])
    specs = {}
    for info in infos:
        kind, tokenizer, options = resolve(info, config.get(info.name, ModalityConfig()))
        fitted = tokenizer.fit(info, options, values_of(info.name))
        specs[info.name] = ModalitySpec(info=info, kind=kind, options=options, fitted=fitted)
    return specs


def resolve(info: ModalityInfo, config: ModalityConfig) -> tuple[str, type[Tokenizer], dict[str, Any]]:
    """The kind, its tokenizer, and its options: defaults with the config's choices over them."""
    kind, tokenizer = tokenizer_class(config.kind or info.kind, name=info.name, chosen=config.kind is not None)
    given = {key: value for key, value in asdict(config).items() if value is not None and key not in _NO_OPTIONS}
    for key in given:
        _check_option(f"modalities.{info.name}.{key}", key, kind, tokenizer)
    for key, value in config.options.items():
        path = f"modalities.{info.name}.options.{key}"
        _check_option(path, key, kind, tokenizer)
        if key in vars(config):
            raise ConfigError(f"{path}: has a key of its own; write modalities.{info.name}.{key}")
        _check_type(path, value, tokenizer.defaults[key])
    return kind, tokenizer, {**tokenizer.defaults, **given, **config.options}


def _check_option(path: str, key: str, kind: str, tokenizer: type[Tokenizer]) -> None:
    if key not in tokenizer.defaults:
        have = ", ".join(sorted(tokenizer.defaults)) or "none"
        raise ConfigError(f"{path}: a modality of kind '{kind}' has no such option; it has {have}")


def _check_type(path: str, value: Any, default: Any) -> None:
    """An option of a kind of the user's own: of the type of its default; a whole number may stand for a float."""
    fits = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
    if default is not None and not fits:
        wanted = type(default).__name__
        raise ConfigError(f"{path}: is {value!r}; allowed: {wanted}, as its default {default!r}")


def build_tokenizer(spec: ModalitySpec, dim: int) -> Tokenizer:
    """The tokenizer that a spec describes, with fresh weights."""
    return find_kind(spec.kind, name=spec.info.name)(spec, dim)


def prepare_functions(specs: Mapping[str, ModalitySpec]) -> Prepare:
    """What the loader's workers do to the values of each modality that needs it."""
    functions = {name: find_kind(spec.kind, name=name).prepare(spec) for name, spec in specs.items()}
    return {name: function for name, function in functions.items() if function is not None}


def specs_to_dict(specs: Mapping[str, ModalitySpec]) -> dict[str, Any]:
    """Specs as JSON types, for modalities.json."""
    return {name: asdict(spec) for name, spec in specs.items()}


def specs_from_dict(data: Mapping[str, Any]) -> dict[str, ModalitySpec]:
    """The inverse of specs_to_dict."""
    specs = {}
    for name, entry in data.items():
        info: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["info"].items()}
        specs[name] = ModalitySpec(**{**entry, "info": ModalityInfo(**info)})
    return specs


def _check_names(config: Mapping[str, ModalityConfig], names: list[str]) -> None:
    unknown = [name for name in config if name not in names]
    if unknown:
        raise ConfigError(
            f"modalities.{unknown[0]}: this run has no modality of that name; it has {', '.join(names)}. "
            "Names are those after `rename`"
        )
