"""Which parts of a model came with which extension: of its configuration, and of its tensors by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from moemm.config import Config
from moemm.config.schema import ExpertGroupConfig, ExtensionConfig, TaskConfig
from moemm.config.suggest import did_you_mean, listed
from moemm.data.catalogue import Catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.errors import ConfigError
from moemm.growth.grown import Base, Specs, fresh_model
from moemm.modalities import prepare_functions
from moemm.models import Model
from moemm.train.init import OF_THE_RUN

SAMPLES = 16
"""Samples of each task whose outputs are compared."""

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model is made of: enough to build it."""

    config: Config
    catalogue: Catalogue
    specs: Specs

    @classmethod
    def of(cls, base: Base) -> Shape:
        """That of a run."""
        return cls(base.run.config, base.run.catalogue, base.run.specs)

    def model(self) -> Model:
        """It with fresh weights, in eval mode on the CPU."""
        return fresh_model(self.config, self.catalogue, self.specs).eval()

    def names(self) -> set[str]:
        """Names of its tensors, but for those that tell how a run's own losses went: all its tasks shape them."""
        return {name for name in self.model().state_dict() if not name.startswith(OF_THE_RUN)}


def find_extension(config: Config, name: str) -> int:
    """Place in `model.extensions` of the one of this name, or that brought the modality `name`. Raises ConfigError."""
    for place, one in enumerate(config.model.extensions):
        if name == one.name or name in one.modalities:
            return place
    have = [one.name for one in config.model.extensions]
    raise ConfigError(
        f"no extension of the run is named {name!r}, and none brought a modality of that name"
        f"{did_you_mean(name, have)}\n  allowed: {', '.join(have) or 'none: the run was never extended'}"
    )


def without(shape: Shape, gone: Iterable[int]) -> Shape:
    """The shape without the extensions at these places of `model.extensions`. Raises ConfigError, see `check_apart`."""
    config, gone = shape.config, set(gone)
    kept = [place for place in range(len(config.model.extensions)) if place not in gone]
    extensions = [config.model.extensions[place] for place in sorted(gone)]
    check_apart(shape, [config.model.extensions[place] for place in kept], extensions)
    tasks = {name for one in extensions for name in one.tasks}
    modalities = {name for one in extensions for name in one.modalities}
    number = {0: 0, **{place + 1: new for new, place in enumerate(kept, 1)}}
    groups = [
        replace(group, added=number[group.added]) for group in config.model.experts.groups if group.added in number
    ]
    model = replace(
        config.model, experts=replace(config.model.experts, groups=groups),
        extensions=[config.model.extensions[place] for place in kept],
    )  # fmt: skip
    changed = replace(
        config, model=model, train=replace(config.train, only=None),
        data=replace(config.data, tasks=learned(task for task in config.data.tasks if task.name not in tasks)),
        modalities={name: one for name, one in config.modalities.items() if name not in modalities},
    )  # fmt: skip
    catalogue = Catalogue(
        tasks=tuple(task for task in shape.catalogue.tasks if task.name not in tasks),
        modalities=tuple(info for info in shape.catalogue.modalities if info.name not in modalities),
    )
    return Shape(changed, catalogue, {name: spec for name, spec in shape.specs.items() if name not in modalities})


def learned(tasks: Iterable[TaskConfig]) -> list[TaskConfig]:
    """The tasks, all of which are trained on: no extension is being trained that would be by itself."""
    return [replace(task, learn=True) for task in tasks]


def check_apart(shape: Shape, kept: Iterable[ExtensionConfig], gone: Iterable[ExtensionConfig]) -> None:
    """Refuse to part what needs each other. Raises ConfigError.

    That is: tasks of `kept` that read a modality of `gone`, or whose samples may use its experts if these were there
    before; experts of `kept` that serve what `gone` brought.
    """
    gone, order = list(gone), shape.config.model.extensions
    for one in kept:
        read = {name for task in shape.catalogue.tasks if task.name in one.tasks for name in task.modalities}
        served = {name for group in groups_of(shape, one) for name in (*(group.modalities or ()), *(group.tasks or ()))}
        for other in gone:
            users = touched(shape, groups_of(shape, other)) if order.index(other) < order.index(one) else set()
            needs = [
                *(f"its tasks read {name}" for name in other.modalities if name in read),
                *(f"its experts serve {name}" for name in (*other.modalities, *other.tasks) if name in served),
                *(f"its task {name} may use the experts of that" for name in one.tasks if name in users),
            ]
            if needs:
                raise ConfigError(
                    f"extension {one.name} cannot be without extension {other.name}: {needs[0]}\n"
                    f"  to do: remove {one.name} first; by itself it can be neither kept nor exported"
                )


def groups_of(shape: Shape, extension: ExtensionConfig) -> list[ExpertGroupConfig]:
    """The groups of experts that an extension of the shape brought."""
    number = shape.config.model.extensions.index(extension) + 1
    return [group for group in shape.config.model.experts.groups if group.added == number]


def touched(shape: Shape, groups: Iterable[ExpertGroupConfig]) -> set[str]:
    """Tasks whose samples may use these experts."""
    found = set()
    for group in groups:
        for task in shape.catalogue.tasks:
            serves = group.modalities is None or set(group.modalities) & set(task.modalities)
            if serves and (group.tasks is None or task.name in group.tasks):
                found.add(task.name)
    return found


def base_tensors(base: Base) -> dict[str, torch.Tensor]:
    """The tensors of a run that no extension brought."""
    shape = Shape.of(base)
    names = without(shape, range(len(shape.config.model.extensions))).names()
    return {name: value for name, value in base.weights.items() if name in names}


def extension_tensors(base: Base, place: int) -> dict[str, torch.Tensor]:
    """The tensors of a run that the extension at this place of `model.extensions` brought.

    Raises ConfigError where it needs another extension.
    """
    shape, numbers = Shape.of(base), range(len(base.run.config.model.extensions))
    alone = without(shape, [number for number in numbers if number != place])
    names = alone.names() - without(shape, numbers).names()
    return {name: value for name, value in base.weights.items() if name in names}


@torch.no_grad()
def outputs(shape: Shape, model: Model, tasks: Iterable[str]) -> dict[str, torch.Tensor]:
    """Task -> what the model says of some samples of its val split, of this task alone in a batch."""
    packer = Packer(shape.catalogue, prepare_functions(shape.specs))
    found = {}
    for task in tasks:
        dataset = SplitDataset(shape.catalogue, task=task, split="val")
        batch = packer([dataset[item] for item in range(min(SAMPLES, len(dataset)))])
        found[task] = model(batch).outputs[task]
    return found


def differing_bits(before: Weights, after: Weights) -> int:
    """Numbers that do not have the same bits; all of a tensor that is missing or has another shape or type."""
    total = 0
    for name, value in before.items():
        other = after.get(name)
        if other is None or other.shape != value.shape or other.dtype != value.dtype:
            total += value.numel()
        else:
            total += int((_bits(value) != _bits(other)).any(-1).sum())
    return total


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change of a number, relative to the largest number."""
    return float((before - after).abs().max() / before.abs().max().clamp_min(1e-12)) if before.numel() else 0.0


def _bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().cpu().contiguous().view(-1, 1).view(torch.uint8)


def shown(names: Iterable[str]) -> str:
    """Names in order, cut after a dozen."""
    return listed(sorted(names))


def plain_name(file: str) -> str:
    """The name of a file without its folders, which mean nothing elsewhere."""
    return os.path.basename(file)
