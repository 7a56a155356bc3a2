"""`train.init`: begin with the weights of another run, where they fit, and with what it learned of the modalities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moemm.checkpoint import Manifest, newest_complete, verify
from moemm.checkpoint.manifest import FILE_NAME
from moemm.checkpoint.store import read_weights
from moemm.config import Config
from moemm.errors import CheckpointError, ConfigError
from moemm.modalities import ModalitySpec, specs_from_dict

_SHAPING = ("dim", "heads", "activation")
"""Keys of `model` without which no tensor means what it meant."""
WHILE_TRAINING = {"dropout", "noise"}
"""Options of a modality that change no weight's meaning."""
OF_THE_RUN = ("fork.", "settler.", "scale.", "pretext.objectives.contrastive.noise.")
"""What a run knows of how its own losses went; of others it would be wrong."""
_SHOWN = 6


def source(init: str) -> tuple[Path, Manifest, Path]:
    """Checkpoint folder of `train.init` with every hash verified, its manifest, the run folder. Or CheckpointError."""
    path = Path(init)
    if (path / FILE_NAME).is_file():
        exported = (path / "modalities.json").is_file()
        return path, verify(path), path if exported else path.parent.parent
    if not (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"train.init: {path} is neither a run folder nor a checkpoint of one.\n"
            f"  allowed: a folder with checkpoints/, one of its step_* folders with a {FILE_NAME}, or an export\n"
            "  to do: give train.output of the run to begin with"
        )
    found = newest_complete(path / "checkpoints")
    return found.folder, found.manifest, path


def reuse_specs(specs: Mapping[str, ModalitySpec], config: Config) -> dict[str, ModalitySpec]:
    """The specs of a new run, with statistics and vocabularies of `train.init` for the modalities that it has too.

    Raises ConfigError where a modality of one name is something else there, or is cut into tokens another way.
    """
    assert config.train.init is not None
    _, _, run = source(config.train.init)
    try:
        stored = specs_from_dict(json.loads((run / "modalities.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"train.init: {run}/modalities.json cannot be read: {error}") from error
    return {name: _reused(spec, stored[name], config) if name in stored else spec for name, spec in specs.items()}


def _reused(spec: ModalitySpec, stored: ModalitySpec, config: Config) -> ModalitySpec:
    name, init = spec.info.name, config.train.init
    for key in ("kind", "ragged", "shape", "dtype", "num_names", "cat_names", "cat_sizes"):
        new, old = getattr(spec.info, key), getattr(stored.info, key)
        if new != old:
            raise ConfigError(
                f"train.init: modality {name} has {key} {new}, and {old} in {init}.\n"
                f"  to do: give it another name with `rename`; its tokenizer then starts fresh"
            )
    given = config.modalities.get(name)
    for key, old in stored.options.items():
        new = given.options.get(key, getattr(given, key, None)) if given is not None else None
        if new is not None and new != old and key not in WHILE_TRAINING:
            raise ConfigError(
                f"modalities.{name}.{key}: is {new}, and {old} in {init}, whose tokenizer train.init takes over.\n"
                f"  to do: leave it out, or give the modality another name with `rename`"
            )
    if spec.kind != stored.kind:
        raise ConfigError(f"modalities.{name}.kind: is {spec.kind}, and {stored.kind} in {init}; give the same")
    training = {key: spec.options[key] for key in WHILE_TRAINING & set(spec.options)}
    return replace(stored, info=spec.info, options={**stored.options, **training})


def initialise(model: nn.Module, init: str) -> str:
    """Load into `model` what fits by name and shape; what was done, for the user. On every rank, before the engine.

    Raises CheckpointError: no complete checkpoint, another width, or nothing that fits.
    """
    folder, manifest, _ = source(init)
    weights = {name: value for name, value in read_weights(folder).items() if not name.startswith(OF_THE_RUN)}
    _check_architecture(model, manifest, folder)
    own = model.state_dict()
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    if not any(name.startswith("trunk.") for name in fitting):
        raise CheckpointError(
            f"train.init: no tensor of the trunk in {folder} fits this model; its model section differs"
        )
    model.load_state_dict(fitting, strict=False)
    return _report(folder, own, weights, fitting)


def _check_architecture(model: nn.Module, manifest: Manifest, folder: Path) -> None:
    before: Mapping[str, Any] = manifest.config.get("model", {})
    differ = [(key, before.get(key), getattr(model.config, key)) for key in _SHAPING]
    lines = [f"\n  model.{key}: was {old!r}, is {new!r}" for key, old, new in differ if old != new]
    if lines:
        raise CheckpointError(
            f"train.init: the model of {folder} is another one:{''.join(lines)}\n"
            "Give the old values, or train without train.init."
        )


def _report(
    folder: Path, own: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], fitting: Mapping[str, Any]
) -> str:
    fresh = [name for name in own if name not in fitting]
    unused = [name for name in weights if name not in fitting]
    lines = [f"began with {len(fitting)} of {len(own)} tensors of {folder}"]
    lines += [f"fresh here: {_some(fresh)}"] if fresh else []
    lines += [f"not used from there: {_some(unused)}"] if unused else []
    return "; ".join(lines)


def _some(names: Sequence[str]) -> str:
    """The names, whole modules for their tensors, the first few of many."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    return ", ".join(modules[:_SHOWN]) + more
