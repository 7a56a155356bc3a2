"""What an extension is: the configuration with it, which experts are copies of which, and which tensors are new."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from moemm.checkpoint.files import write_text_atomic
from moemm.config import Config, TaskConfig, from_dict, to_dict
from moemm.config.schema import ExpertGroupConfig, ExtensionConfig
from moemm.errors import CheckpointError, ConfigError
from moemm.moe import Expert, ExpertMap, experts_of_groups

FORMAT = 1
_BLOCK = re.compile(r"^trunk\.blocks\.\d+\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An extension of one checkpoint, before anything is written.

    run, base: its folder, and `weights_hash` of its newest complete checkpoint. name: of the extension.
    modalities, tasks: that come with it. experts: ids of the new ones. layers: where they stand.
    visible_to: modalities, or a task, whose samples may use them.
    touched: old tasks whose outputs may change, because their samples may use the new experts, or all if `unfrozen`.
    sources: new expert -> layer, as text -> the old expert that it is a copy of; what is left out is drawn.
    config: the whole configuration of the extended run. measured: what the choices were made by.
    """

    run: str
    base: str
    name: str
    modalities: tuple[str, ...]
    tasks: tuple[str, ...]
    experts: tuple[str, ...]
    layers: tuple[int, ...]
    visible_to: tuple[str, ...]
    touched: tuple[str, ...]
    unfrozen: bool
    sources: dict[str, dict[str, str]]
    config: dict[str, Any]
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    changed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"format": FORMAT, **values}

    def save(self, path: Path | str) -> Path:
        """Write it as JSON. Raises OSError."""
        write_text_atomic(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read what `save` wrote. Raises CheckpointError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            found = values.pop("format", None) if isinstance(values, dict) else None
            if found != FORMAT:
                raise CheckpointError(f"{path} is no plan of format {FORMAT}, which this version of moemm reads")
            names = {one.name for one in fields(cls)}
            given: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if key in names}
            return cls(**given)
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path} is no plan of an extension: {error}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """What the configuration of a run gets. kind, width: of the experts; layers: numbers; count: in each of them."""

    name: str
    task: TaskConfig | None
    modalities: tuple[str, ...]
    visible_to: tuple[str, ...]
    kind: str
    width: int
    count: int
    layers: tuple[int, ...]
    norms: bool

    def group(self, modalities: Sequence[str], number: int) -> ExpertGroupConfig:
        """Its group of experts, of extension `number`. modalities: the old ones; else `visible_to` names tasks."""
        named = [name for name in self.visible_to if name in (*modalities, *self.modalities)]
        skills = [name for name in self.visible_to if name not in named]
        return ExpertGroupConfig(
            kind=self.kind,  # type: ignore[arg-type]
            count=self.count,
            width=self.width,
            modalities=named or None,
            tasks=skills or None,
            layers=",".join(map(str, self.layers)),
            id=self.name,
            added=number,
        )


def extended(config: Config, modalities: Sequence[str], addition: Addition) -> Config:
    """The configuration of a run with an addition; `modalities`: those that it has, in order.

    What is open to modalities that come later in a way that would make experts for them (a group for each modality) is
    closed, so that the extension alone says which experts there are; ids stay as they are. Raises ConfigError.
    """
    model = config.model
    number = len(model.extensions) + 1
    brought = [addition.task.name] if addition.task else []
    tasks = [*config.data.tasks, *([addition.task] if addition.task else [])]
    groups = closed(model.experts.groups, modalities)
    if addition.layers:
        groups = [*groups, addition.group(modalities, number)]
    extension = ExtensionConfig(
        name=addition.name, modalities=list(addition.modalities), tasks=brought, norms=addition.norms
    )
    changed = replace(
        config,
        data=replace(config.data, tasks=tasks),
        model=replace(
            model,
            experts=replace(model.experts, groups=groups),
            extensions=[*model.extensions, extension],
        ),
    )
    checked = from_dict(to_dict(changed), origin=f"{config.name} with {addition.name}")
    _check_ids(config, modalities, addition)
    return checked


def closed(groups: Sequence[ExpertGroupConfig], modalities: Sequence[str]) -> list[ExpertGroupConfig]:
    """Groups that make the same experts, in the same order, for `modalities`, and none for others that come later."""
    named = {name for group in groups if group.kind == "modality" for name in group.modalities or ()}
    found = []
    for group in copy.deepcopy(list(groups)):
        each = group.kind == "modality" and group.tasks is None
        if group.modalities is not None or not (each or group.per_modality):
            found.append(group)
            continue
        own = [name for name in modalities if name not in named] if each else list(modalities)
        if own:
            found.append(replace(group, modalities=own, per_modality=True))
    return found


def _check_ids(config: Config, modalities: Sequence[str], addition: Addition) -> None:
    known = [
        e.id for made in experts_of_groups(config.model.experts.groups, modalities, config.model.layers) for e in made
    ]
    taken = [name for name in expert_ids(addition) if name in known]
    if taken or addition.name in [one.name for one in config.model.extensions]:
        raise ConfigError(
            f"the name {addition.name!r} is taken by {'an expert' if taken else 'an extension'} of the run\n"
            f"  experts: {', '.join(known)}\n  to do: give the extension another name (--name)"
        )


def expert_ids(addition: Addition) -> tuple[str, ...]:
    """Ids of its experts."""
    if not addition.layers:
        return ()
    one = addition.count == 1
    return (addition.name,) if one else tuple(f"{addition.name}_{number}" for number in range(addition.count))


def candidates(expert_map: ExpertMap, layers: Sequence[int], width: int) -> list[Expert]:
    """Old experts that tokens are dispatched to, with weights of this width, in all of `layers`."""
    return [
        expert
        for expert in expert_map.experts
        if expert.kind in ("modality", "routed")
        and expert.width == width
        and (expert.layers is None or set(layers) <= set(expert.layers))
    ]


def start(weights: Mapping[str, torch.Tensor], sources: Mapping[str, Mapping[str, str]]) -> dict[str, torch.Tensor]:
    """The weights of an extended model with those of its new experts, and their router rows, copied from old experts.
    """  # fmt: skip
    found = dict(weights)
    for new, by_layer in sources.items():
        for layer, old in by_layer.items():
            prefix = f"trunk.blocks.{layer}.ffn."
            for matrix in ("w1_FD", "w2_DF"):
                found[f"{prefix}experts.{new}.{matrix}"] = weights[f"{prefix}experts.{old}.{matrix}"].clone()
            for rows in ("router.rows.all.", "router.noise."):
                if f"{prefix}{rows}{new}" in weights and f"{prefix}{rows}{old}" in weights:
                    found[f"{prefix}{rows}{new}"] = weights[f"{prefix}{rows}{old}"].clone()
    return found


def silenced(weights: Mapping[str, torch.Tensor], experts: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights with the second matrix of these experts 0, so that they add nothing at first."""
    found = dict(weights)
    for name in weights:
        if name.endswith(".w2_DF") and name.split(".")[-2] in experts:
            found[name] = torch.zeros_like(weights[name])
    return found


def share_norms(weights: Mapping[str, torch.Tensor], modalities: Sequence[str]) -> dict[str, torch.Tensor]:
    """The weights with the norms of new modalities begun as those that the old ones share."""
    found = dict(weights)
    for name in weights:
        before, own, rest = name.partition(".own_norms.")
        if own and rest.partition(".")[0] in modalities:
            found[name] = weights[f"{before}.weight"].clone()
    return found


def only_new(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Patterns for `train.only` that match the names in `new` that are not in `old`, and no others of `new`.

    One pattern for all blocks where no old name has that form.
    """
    patterns: dict[str, None] = {}
    for name in (one for one in new if one not in old):
        form = _BLOCK.sub("trunk.blocks.*.", name)
        patterns[name if any(fnmatchcase(one, form) for one in old) else form] = None
    return list(patterns)


def check_shapes(old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    """That an extended model has every tensor of the old one, in its shape. Raises ConfigError."""
    changed = [name for name, value in old.items() if name not in new or new[name].shape != value.shape]
    if changed:
        name = changed[0]
        now = "is not there" if name not in new else f"has shape {tuple(new[name].shape)}"
        key = "objectives" if name.startswith("pretext.") else "harmonize"
        raise ConfigError(
            f"the run cannot be extended: {name} has shape {tuple(old[name].shape)} and {now} with the extension\n"
            "  allowed: extensions add tensors and reshape none\n"
            f"  to do: train the run once more without what keeps a value for each loss or sample in `{key}`, with "
            "train.init, and extend that"
        )
