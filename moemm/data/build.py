"""From the `data` section of a config to a catalogue: every file opened, checked, and checked against the others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from moemm.config.joint import joint_groups
from moemm.config.schema import DataConfig, TaskConfig
from moemm.config.suggest import did_you_mean, listed
from moemm.data.catalogue import SPLITS, Catalogue, ModalityInfo, TaskInfo
from moemm.data.classes import unseen_classes
from moemm.data.file import DataFile
from moemm.data.limits import NAME, printable
from moemm.data.shared import no_modality, open_shared
from moemm.errors import ConfigError, DataError

TOGETHER = 5
"""Samples of a bag that are drawn one after the other, when the task does not say: as many as MIL-NCE's candidates."""
_ALIKE = ("kind", "ragged", "shape", "dtype", "num_names", "cat_names", "cat_sizes")
"""What modalities of one name must agree in."""
_ALIKE_IF_KNOWN = ("rate_hz", "layout", "unit", "channels")


def build_catalogue(config: DataConfig, *, base: Path) -> Catalogue:
    """The tasks in the config's order, and their modalities in the order in which they first appear.

    base: what `data.root` is relative to, the config file's folder.
    Raises ConfigError: names in the config that the files lack. DataError: a file that is broken, without a needed
    split or class, with samples that have nothing, or at odds with another file about a modality.
    """
    names = [task.name for task in config.tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.tasks: {names.count(name)} tasks are named {name!r}; give each its own name")
    drawn_with = {task.name: first.name for first, *others in joint_groups(config) for task in others}
    tasks: list[TaskInfo] = []
    merged: dict[str, ModalityInfo] = {}
    owners: dict[str, TaskConfig] = {}
    filled: set[str] = set()
    for entry in config.tasks:
        file = open_shared(os.path.normpath(base / config.root / entry.file))
        chosen = _chosen(entry, file)
        tasks.append(replace(_task(entry, file, chosen), drawn_with=drawn_with.get(entry.name)))
        train = file.split == SPLITS["train"]
        for name, stored in chosen.items():
            info = replace(next(m for m in file.modalities if m.name == stored), name=name)
            if name in merged:
                _check_alike(merged[name], info, owners[name], entry, stored)
            merged[name] = _known(merged.get(name, info), info)
            owners.setdefault(name, entry)
            if file.present(stored)[train].any():
                filled.add(name)
    for name, owner in owners.items():
        if name not in filled:
            raise DataError(
                f"{owner.file}: no sample of split train has modality {name}\n  allowed: modalities to learn from\n"
                f"  to do: leave it out with `modalities` of task {owner.name}, or add samples to split train"
            )
    return Catalogue(tasks=tuple(tasks), modalities=tuple(merged.values()))


def _chosen(entry: TaskConfig, file: DataFile) -> dict[str, str]:
    """Name in the run -> name in the file, of the modalities that the task uses."""
    have = [info.name for info in file.modalities]
    for name, new in entry.rename.items():
        if name not in have:
            raise ConfigError(
                f"data.tasks: task {entry.name}: rename: {entry.file} has no modality {name!r}, only "
                f"{listed(have)}{did_you_mean(name, have)}"
            )
        if not NAME.fullmatch(new):
            raise ConfigError(f"data.tasks: task {entry.name}: rename: {new!r} is no name; allowed: {NAME.pattern}")
    renamed: dict[str, str] = {}
    for name in have:
        new = entry.rename.get(name, name)
        if new in renamed:
            raise ConfigError(f"data.tasks: task {entry.name}: {renamed[new]} and {name} would both be named {new!r}")
        renamed[new] = name
    for name in entry.modalities or ():
        if name not in renamed:
            raise ConfigError(
                f"data.tasks: task {entry.name}: modalities: {entry.file} has no modality {name!r}, "
                f"only (after rename) {listed(renamed)}{did_you_mean(name, renamed)}"
            )
    return {new: name for new, name in renamed.items() if entry.modalities is None or new in entry.modalities}


def _task(entry: TaskConfig, file: DataFile, chosen: Mapping[str, str]) -> TaskInfo:
    targets = file.targets(entry.label)
    label = file.info.labels[entry.label]
    task = TaskInfo(
        name=entry.name,
        file=file.path,
        label=entry.label,
        target=label.target,
        outputs=label.outputs,
        metric=label.metric,
        modalities=tuple(chosen),
        sizes={name: int((file.split == number).sum()) for name, number in SPLITS.items()},
        class_names=label.class_names,
        weight=entry.weight,
        stored=tuple(chosen.values()),
        bags=entry.bags,
        together=1 if entry.bags is None else entry.together or TOGETHER,
    )
    if entry.bags is not None:
        file.bags(entry.bags)  # refuses what the file lacks
    for split in ("train", "val"):
        if not task.sizes[split]:
            counts = ", ".join(f"{name} {number}" for name, number in task.sizes.items())
            raise DataError(
                f"{file.path}: /split: no sample of split {split} (task {task.name}; {counts})\n"
                f"  allowed: samples in train ({SPLITS['train']}) and val ({SPLITS['val']})\n"
                f"  to do: mark some samples with {SPLITS[split]} in /split"
            )
    unseen = unseen_classes(label, targets, file.split)
    if unseen:
        raise DataError(
            f"{file.path}: /{entry.label}: no training sample of {unseen} (task {task.name})\n"
            "  allowed: classes of val and test that also occur in train\n"
            "  to do: move samples of them to train, or leave them out of val and test (split 3, ood, may have them)"
        )
    lacking = ~np.any([file.present(name) for name in chosen.values()], axis=0)
    if lacking.any():
        raise no_modality(task, np.flatnonzero(lacking).tolist())
    return task


def _known(first: ModalityInfo, second: ModalityInfo) -> ModalityInfo:
    """`first` with what only `second` knows."""
    extra = {key: getattr(first, key) or getattr(second, key) for key in _ALIKE_IF_KNOWN}
    return replace(first, **extra)


def differing(first: ModalityInfo, second: ModalityInfo) -> list[tuple[str, str, str]]:
    """What keeps two modalities from being read by one tokenizer: the key, and its value in each, as text."""
    keys = [key for key in _ALIKE if getattr(first, key) != getattr(second, key)]
    keys += [
        key
        for key in _ALIKE_IF_KNOWN
        if getattr(first, key) and getattr(second, key) and getattr(first, key) != getattr(second, key)
    ]
    return [(key, _show(first, key), _show(second, key)) for key in keys]


def _check_alike(first: ModalityInfo, second: ModalityInfo, owner: TaskConfig, entry: TaskConfig, stored: str) -> None:
    differ = differing(first, second)
    if not differ:
        return
    rename = {**entry.rename, stored: f"{entry.name}_{stored}"}
    line = ", ".join(f"{key}: {value}" for key, value in rename.items())
    details = "; ".join(f"{key} {one} against {other}" for key, one, other in differ)
    raise DataError(
        f"{owner.file} (task {owner.name}) and {entry.file} (task {entry.name}) disagree about modality "
        f"{first.name!r}: {details}\n"
        "  allowed: one kind, shape and type for all modalities of one name\n"
        f"  to do: give it another name in one task; under task {entry.name} write\n    rename: {{{line}}}"
    )


def _show(info: ModalityInfo, key: str) -> str:
    return printable(getattr(info, key), limit=80)
