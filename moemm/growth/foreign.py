"""Foreign checkpoints: safetensors, alone or in shards, and a rule file -> a dense moemm model. No code is ever run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moemm.config import LoadedConfig
from moemm.config.schema import ExpertGroupConfig, RouterConfig
from moemm.config.suggest import listed, missing_path
from moemm.errors import CheckpointError, ConfigError
from moemm.growth.grown import fresh_model
from moemm.growth.receipt import weights_hash
from moemm.growth.rule_file import RuleFile, read_rules
from moemm.growth.rules import Tensors, apply_rules, match
from moemm.growth.upcycling import Start, settled
from moemm.train.setup import learn_modalities

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
_CODE = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".msgpack", ".h5", ".onnx", ".gguf"}
_MAX_INDEX = 64 * 1024 * 1024
_WIDTH = "trunk.blocks.{i}.ffn.w2_DF"


def refuse_code(path: Path) -> None:
    """Refuse a file, or a folder of files, of a format that may run code when it is read. Raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(missing_path(path, what="run folder or safetensors file"))
    files = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
    if any(entry.name.endswith((SUFFIX, INDEX)) or entry.name == "config.yaml" for entry in files):
        return
    unsafe = sorted(entry.name for entry in files if entry.suffix in _CODE)
    if unsafe or path.is_file():
        raise CheckpointError(
            f"{path} is not read: {', '.join(unsafe) or path.name}\n"
            "  allowed: safetensors (a file, or a folder with its shards and index), or a run folder of moemm; other "
            "formats may run code when they are read\n"
            "  to do: save the model as safetensors where it comes from: model.save_pretrained(folder) does"
        )


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of the shards in a folder; fp32 where floating.

    Raises CheckpointError: other formats, broken files, an index that lies outside the folder or names what is not
    there, names that stand twice.
    """
    refuse_code(path)
    found: dict[str, torch.Tensor] = {}
    owners: dict[str, str] = {}
    for file in _files(path):
        for name, tensor in _read(file).items():
            if name in found:
                raise CheckpointError(f"{path}: {name} stands in {owners[name]} and in {file.name}; delete one of them")
            found[name], owners[name] = tensor.float() if tensor.is_floating_point() else tensor, file.name
    for name, shard in _index(path).items():
        if owners.get(name) != shard:
            raise CheckpointError(f"{path}: the index says that {name} is in {shard}, which does not hold it")
    return found


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    shards = sorted(set(_index(path).values()))
    if shards:
        lacking = [name for name in shards if not (path / name).is_file()]
        if lacking:
            raise CheckpointError(f"{path} lacks {listed(lacking)}, which its index names; copy the whole folder")
        return [path / name for name in shards]
    files = sorted(entry for entry in path.iterdir() if entry.name.endswith(SUFFIX))
    if not files:
        raise CheckpointError(f"{path} holds no {SUFFIX} file; give a file, or the folder that save_pretrained wrote")
    return files


def _index(path: Path) -> dict[str, str]:
    """Tensor -> shard, of the index file of a folder; empty where there is none."""
    files = sorted(path.glob(f"*{INDEX}")) if path.is_dir() else []
    if not files:
        return {}
    try:
        if files[0].stat().st_size > _MAX_INDEX:
            raise ValueError("larger than 64 MiB")
        known = json.loads(files[0].read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{files[0]} is no index of shards: {error}") from error
    named = isinstance(known, dict) and all(isinstance(one, str) for one in known.values())
    if len(files) > 1 or not named:
        raise CheckpointError(f"{path}: wanted one index, with a weight_map from tensors to the names of files")
    outside = [name for name in known.values() if Path(name).name != name or not name.endswith(SUFFIX)]
    if outside:
        raise CheckpointError(f"{files[0]} names {outside[0]!r}; allowed: {SUFFIX} files beside it")
    return dict(known)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{file} is no safetensors file, or a broken one: {error}; copy it again") from error


def read_foreign(path: Path, rules: Path, recipe: LoadedConfig) -> Start:
    """A dense model from foreign weights, on the data that the recipe names.

    Its `model` is that of the recipe with one dense network a layer, of the width that the foreign one has.
    Raises CheckpointError as `read_tensors` and `apply_rules`, ConfigError for a wrong rule file, DataError.
    """
    file, tensors = read_rules(rules), read_tensors(path)
    source = file.named(tensors)
    if len(source) < len(tensors):
        raise ConfigError(f"{rules}: `strip` makes two names of the source one; take off less")
    config = recipe.config
    groups = [ExpertGroupConfig(kind="shared", width=_width(file, source, rules))]
    experts = replace(config.model.experts, groups=groups, backend="auto")
    share = config.model.share if config.model.latents else []
    dense = replace(config.model, moe="dense", experts=experts, router=RouterConfig(), untie=[], share=share)
    config = settled(replace(config, model=dense, train=replace(config.train, init=None)))
    catalogue, specs = learn_modalities(replace(recipe, config=config))
    model = fresh_model(config, catalogue, specs)
    weights, taken = apply_rules(file.rules, source, model.state_dict())
    model.load_state_dict(weights)
    known: dict[str, object] = {"folder": str(path), "sha256": weights_hash(tensors)}
    notes = [f"dense model by {rules.name}: {line}" for line in taken.lines()]
    return Start(
        config=config, catalogue=catalogue, specs=specs, model=model.eval(), weights=weights, path=recipe.path,
        sources=[known], notes=notes,
    )  # fmt: skip


def _width(file: RuleFile, source: Tensors, rules: Path) -> int:
    """Hidden units of the foreign dense network."""
    for rule in file.rules:
        for to in rule.targets:
            if match(_WIDTH, to.pattern.replace("{i}", "0")) is None or len(rule.sources) != 1:
                continue
            names = [name for name in source if match(rule.sources[0], name) is not None]
            if names:
                return _columns(to.transform([source[names[0]]], torch.empty(0)), names[0])
    raise ConfigError(f"{rules}: no rule makes {_WIDTH}, the second matrix of each layer's dense network")


def _columns(value: torch.Tensor, name: str) -> int:
    if value.dim() != 2:
        raise ConfigError(
            f"{name} becomes a second matrix of {value.dim()} dimensions; wanted is (width, hidden units)"
        )
    return value.shape[1]


def looks_foreign(path: Path) -> bool:
    """Whether a path is a file, or a folder of weights that is no run."""
    return path.is_file() or (not (path / "config.yaml").is_file() and any(path.glob(f"*{SUFFIX}")))
