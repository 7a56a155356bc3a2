"""Groups of modalities -> a configuration in which those of a group share their modality experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moemm.config import Config
from moemm.config.schema import ExpertGroupConfig, ExpertsConfig
from moemm.data.catalogue import TaskInfo
from moemm.errors import ConfigError
from moemm.modalities import ModalitySpec
from moemm.models import build_model
from moemm.moe import ExpertMap

PREFIX = "family"


def regroup(config: Config, groups: Sequence[Sequence[str]], tasks: Sequence[str]) -> Config:
    """The configuration with a modality expert for each of `groups`, as wide and in the layers of the first one so far.

    Modality groups for skills (`tasks`) and groups of other kinds stay. A `model.share` that was given becomes these
    groups too. tasks: names of the run's tasks.
    Raises ConfigError: no modality group to take the width from; an expert that needs one which is gone.
    """
    before = config.model.experts.groups
    places = [place for place, group in enumerate(before) if group.kind == "modality" and group.tasks is None]
    if not places:
        raise ConfigError(
            "model.experts.groups has no group of kind modality, so there is no width for the groups' experts; "
            "add one: {kind: modality, width: 64}"
        )
    pattern = before[places[0]]
    families = [
        replace(pattern, modalities=list(names), id=f"{PREFIX}_{number}") for number, names in enumerate(groups)
    ]
    after: list[ExpertGroupConfig] = []
    for place, group in enumerate(before):
        after += families if place == places[0] else [] if place in places else [group]
    share = [list(names) for names in groups if len(names) > 1] if config.model.share else []
    model = replace(config.model, experts=ExpertsConfig(groups=after), share=share)
    names = [name for group in groups for name in group]
    ExpertMap.from_config(after, names, tasks, model.layers)  # says what does not fit before anything is written
    return replace(config, model=model)


def parameters(config: Config, specs: Mapping[str, ModalitySpec], tasks: Sequence[TaskInfo]) -> int:
    """Parameters of the configuration's whole model."""
    return build_model(config.model, specs=specs, tasks=tasks).num_parameters()[0]


def largest_number(config: Config, specs: Mapping[str, ModalitySpec], tasks: Sequence[TaskInfo], *, budget: int) -> int:
    """The most groups with which the whole model has at most `budget` parameters; at most one a modality.

    Raises ConfigError where one group is already too much.
    """
    names, labels = list(specs), [task.name for task in tasks]
    least = parameters(regroup(config, [names], labels), specs, tasks)
    if least > budget:
        raise ConfigError(
            f"--budget {budget}: with one expert for all modalities the model has {least:,} parameters; give at least "
            "that, or lower model.dim or the widths of model.experts.groups"
        )
    if len(names) == 1:
        return 1
    each = parameters(regroup(config, [names[:1], names[1:]], labels), specs, tasks) - least
    return min(len(names), 1 + (budget - least) // each)
