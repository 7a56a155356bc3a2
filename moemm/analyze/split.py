"""Which experts lasting conflicts ask to split, by modality or by task, and the configuration in which they are.

What two losses do to an expert is the product of their gradients. The part of it from tokens of different modalities
goes away where each modality has an expert of its own; all of it where each task has.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moemm.analyze.gradients import Part
from moemm.config import Config
from moemm.config.schema import ExpertGroupConfig, ExpertsConfig
from moemm.data.catalogue import Catalogue, task_groups
from moemm.models import Model
from moemm.moe import ExpertMap, experts_of_groups

Remedy = Literal["modality", "task"]
LAST = 3
"""Checkpoints, the newest ones, of which more than half must show a conflict that is said to last."""
RISK = 0.05
"""Chance that a run without any conflict is said to have one, were batches independent."""


@dataclass(frozen=True, slots=True)
class Atom:
    """Experts of one group and layer that serve the same modalities (None: all), so that they are split together."""

    group: int
    layer: int
    modalities: tuple[str, ...] | None
    ids: tuple[str, ...]
    name: str

    @property
    def part(self) -> Part:
        """Under which its products stand."""
        return Part(self.layer, "expert", self.ids[0]) if len(self.ids) == 1 else Part(self.layer, "group", self.name)


@dataclass(frozen=True, slots=True)
class Split:
    """What is to be split, how, and into whose: modalities, or tasks; what is named in none shares one."""

    atom: Atom
    remedy: Remedy
    names: tuple[tuple[str, ...], ...]


def all_atoms(config: Config, model: Model) -> list[Atom]:
    """Those of a model; none where it is dense."""
    if config.model.moe == "dense":
        return []
    groups, layers = config.model.experts.groups, config.model.layers
    found: list[Atom] = []
    for number, made in enumerate(experts_of_groups(groups, model.map.modalities, layers)):
        for served in dict.fromkeys(expert.modalities for expert in made):
            own = [expert for expert in made if expert.modalities == served]
            name = "_".join([groups[number].id or groups[number].kind, *(served or ()), *(groups[number].tasks or ())])
            taken = {atom.name for atom in found}
            name = name if name not in taken else f"{name}_of_group_{number}"
            for layer in range(layers) if own[0].layers is None else own[0].layers:
                found.append(Atom(number, layer, served, tuple(expert.id for expert in own), name))
    return found


def atoms(config: Config, model: Model) -> dict[Part, tuple[str, ...]]:
    """Atoms of several experts: the part under which their sum stands, and the experts' ids."""
    return {atom.part: atom.ids for atom in all_atoms(config, model) if len(atom.ids) > 1}


def lasting(values: Mapping[str, Any], *, least: float = 0.0) -> list[dict[str, Any]]:
    """Entries of `parts` in which the losses oppose each other clearly and lastingly, the worst first.

    Clearly: the mean cosine is at most -`least` and under 0 by more than chance, by Student's t at a risk of RISK that
    all entries share. Lastingly: at the newest checkpoint, and at more than half of the newest LAST. Besides the keys
    of the newest step each has "clear" and "of": at how many of those.
    """
    from scipy.stats import t as student

    tested = [entry for entry in values["parts"] if entry["kind"] not in ("experts", "layer")]
    risk = RISK / max(1, len(tested))
    found = []
    for entry in tested:
        clear = []
        for cos, error, number in zip(entry["cos"], entry["error"], entry["batches"], strict=True):
            known = cos is not None and error is not None
            bound = error * float(student.ppf(1.0 - risk, number - 1)) if known else 0.0
            clear.append(known and cos <= -least and cos + bound < 0)
        recent = clear[-LAST:]
        if recent[-1] and sum(recent) > len(recent) / 2:
            newest = {key: value[-1] if isinstance(value, list) and key != "losses" else value
                      for key, value in entry.items()}  # fmt: skip
            found.append({**newest, "clear": sum(recent), "of": len(recent)})
    return sorted(found, key=lambda one: float(one["cos"]))


def propose(
    config: Config, model: Model, catalogue: Catalogue, conflicts: Sequence[Mapping[str, Any]]
) -> tuple[list[Split], list[dict[str, Any]]]:
    """The splits that take conflicts away, and for each conflict {"title", "losses", "remedy", "why"}.

    conflicts: as `lasting` gives them. remedy: "modality", "task", or None where experts cannot help.
    """
    by_part = {atom.part: atom for atom in all_atoms(config, model)}
    bases = {group.base for group in config.model.experts.groups if group.base}
    told, wanted = [], dict[Atom, list[tuple[Remedy, Mapping[str, Any]]]]()
    covered = {(atom.layer, name): atom for atom in by_part.values() if len(atom.ids) > 1 for name in atom.ids}
    together = [(Part(one["layer"], one["kind"], one["name"]), one["losses"]) for one in conflicts]
    for one in conflicts:
        atom = by_part.get(Part(one["layer"], one["kind"], one["name"]))
        group = covered.get((one["layer"], one["name"])) if atom is None else None
        if group is not None and (group.part, one["losses"]) in together:
            continue  # one of several experts that are split together, if they are
        if group is not None:
            told.append(_told(one, None, f"of the experts of {group.name}, which are split together, this one alone"))
            continue
        remedy, why = _remedy(one, atom, config, model, catalogue, bases)
        told.append(_told(one, remedy, why))
        if atom is not None and remedy is not None:
            wanted.setdefault(atom, []).append((remedy, one))
    return [_split(atom, found, catalogue) for atom, found in wanted.items()], told


def _told(one: Mapping[str, Any], remedy: Remedy | None, why: str) -> dict[str, Any]:
    return {"title": one["title"], "losses": one["losses"], "remedy": remedy, "why": why}


def _remedy(
    one: Mapping[str, Any], atom: Atom | None, config: Config, model: Model, catalogue: Catalogue, bases: set[str]
) -> tuple[Remedy | None, str]:
    """What takes a conflict away, and why."""
    if atom is None:
        what = "model.moe is dense: experts are for `sparse`" if one["kind"] == "ffn" else "these are no experts"
        return None, f"{what}; harmonize can weigh the losses"
    group = config.model.experts.groups[atom.group]
    if group.kind == "lora" or bases & set(atom.ids):
        return None, "a lora expert or its base, which stay as they are"
    served = atom.modalities or model.map.modalities
    between = one["cos"] - one["same"]
    if len(served) > 1 and between <= one["cos"] / 2:
        return "modality", f"{between / one['cos']:.0%} of it is between modalities"
    together = {frozenset(catalogue.tasks[n].name for n in members) for members in task_groups(catalogue.tasks)}
    names = {task.name for task in catalogue.tasks}
    if not set(one["losses"]) <= names:
        return None, "within each modality, and one of the losses is no task; harmonize can weigh them"
    if any(set(one["losses"]) <= members for members in together):
        return None, "within each modality, of labels that share each sample; harmonize can weigh them"
    return "task", f"{one['same'] / one['cos']:.0%} of it is within one modality"


def _split(atom: Atom, found: Sequence[tuple[Remedy, Mapping[str, Any]]], catalogue: Catalogue) -> Split:
    """By what takes most of an atom's conflicts away. Tasks that share their samples stay together."""
    weight = {which: sum(-one["cos"] for remedy, one in found if remedy == which) for which in ("modality", "task")}
    if weight["modality"] >= weight["task"]:
        return Split(atom, "modality", ())
    losses = {name for remedy, one in found if remedy == "task" for name in one["losses"]}
    groups = [tuple(catalogue.tasks[n].name for n in members) for members in task_groups(catalogue.tasks)]
    return Split(atom, "task", tuple(names for names in groups if losses & set(names)))


def separate(config: Config, model: Model, splits: Sequence[Split]) -> Config:
    """The configuration in which these experts are split; all others stay, under their names.

    New groups stand behind those that were there. Shared experts become modality experts; of routed ones each modality
    or task gets its share, at least `top_k`. Raises ConfigError where the map does not fit.
    """
    modalities, tasks = model.map.modalities, [task.name for task in model.tasks]
    before, layers = config.model.experts.groups, config.model.layers
    split_groups = {split.atom.group for split in splits}
    made = experts_of_groups(before, modalities, layers)
    explicit = any(g.kind == "modality" and (g.modalities or n in split_groups) for n, g in enumerate(before))
    stay: list[ExpertGroupConfig] = []
    new: list[ExpertGroupConfig] = []
    for number, group in enumerate(before):
        served = list(dict.fromkeys(expert.modalities for expert in made[number]))
        open_ended = group.kind == "modality" and group.modalities is None and group.tasks is None
        own = [split for split in splits if split.atom.group == number]
        if (own or (open_ended and explicit)) and (open_ended or group.per_modality):
            pieces = [_piece(group, names, place) for place, names in enumerate(served)]
        else:
            pieces = [(group, served[0] if served else None)]
        for piece, names in pieces:
            here = [split for split in own if split.atom.modalities == names]
            stay += _left(piece, here, layers)
            new += _instead(piece, here, config, modalities=modalities, tasks=tasks, explicit=explicit)
    model_config = replace(config.model, experts=ExpertsConfig(groups=stay + new))
    ExpertMap.from_config(stay + new, modalities, tasks, layers)  # says what does not fit before anything is written
    return replace(config, model=model_config)


def _piece(
    group: ExpertGroupConfig, names: tuple[str, ...] | None, place: int
) -> tuple[ExpertGroupConfig, tuple[str, ...] | None]:
    """The experts of a group that serve the same modalities, as a group that names them."""
    own = None if group.id is None else f"{group.id}_{place}"
    return replace(group, modalities=list(names or ()), per_modality=False, id=own), names


def _left(group: ExpertGroupConfig, splits: Sequence[Split], layers: int) -> list[ExpertGroupConfig]:
    """The group in the layers where it stays."""
    from moemm.config.layers import parse_layers

    gone = {split.atom.layer for split in splits}
    rest = [layer for layer in parse_layers(group.layers, layers) if layer not in gone]
    return [replace(group, layers=_text(rest)) if gone else group] if rest else []


def _instead(
    group: ExpertGroupConfig,
    splits: Sequence[Split],
    config: Config,
    *,
    modalities: Sequence[str],
    tasks: Sequence[str],
    explicit: bool,
) -> Iterator[ExpertGroupConfig]:
    """What stands in the layers where a group is split; layers that are split alike together."""
    alike: dict[tuple[Remedy, tuple[tuple[str, ...], ...]], list[int]] = {}
    for split in splits:
        alike.setdefault((split.remedy, split.names), []).append(split.atom.layer)
    for (remedy, names), where in alike.items():
        own = replace(group, layers=_text(where), id=None)
        if remedy == "modality":
            yield from _by_modality(own, config, modalities, explicit=explicit)
        else:
            yield from _by_task(own, config, names, tasks)


def _by_modality(
    group: ExpertGroupConfig, config: Config, modalities: Sequence[str], *, explicit: bool
) -> list[ExpertGroupConfig]:
    served = group.modalities or modalities
    if group.kind in ("routed", "zero"):
        return [replace(group, per_modality=True, count=_share(group.count, len(served), config))]
    hard = replace(group, kind="modality")
    if group.kind == "shared" and not explicit:
        return [hard]
    return [replace(hard, modalities=[name]) for name in served]


def _by_task(
    group: ExpertGroupConfig, config: Config, names: Sequence[Sequence[str]], tasks: Sequence[str]
) -> list[ExpertGroupConfig]:
    able = group.tasks or tasks
    own = [[name for name in one if name in able] for one in names]
    rest = [name for name in able if not any(name in one for one in own)]
    found = [one for one in (*own, rest) if one]
    routed = group.kind in ("routed", "zero")
    hard = group if routed else replace(group, kind="modality")
    count = _share(group.count, len(found), config) if routed else group.count
    return [replace(hard, tasks=one, count=count) for one in found]


def _share(count: int, parts: int, config: Config) -> int:
    return max(config.model.router.top_k or 1, math.ceil(count / parts))


def _text(layers: Sequence[int]) -> str:
    return ",".join(map(str, sorted(layers)))
