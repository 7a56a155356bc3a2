"""How a plan of an extension is made: what the data brings, which layers get experts, and what those are copies of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moemm.config import Config, TaskConfig, from_dict, to_dict
from moemm.config.layers import parse_layers
from moemm.config.schema import ExpertGroupConfig, ModalityConfig
from moemm.config.suggest import did_you_mean, listed
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.data.file import DataFile
from moemm.data.limits import NAME
from moemm.errors import ConfigError
from moemm.growth.extension import (
    Addition,
    Plan,
    candidates,
    check_shapes,
    expert_ids,
    extended,
    only_new,
    start,
)
from moemm.growth.extension_proof import old_batches
from moemm.growth.extension_trial import Known, Trial, most_shifted, router_shift, usage
from moemm.growth.grown import Base, Specs, fresh_model
from moemm.growth.receipt import weights_hash
from moemm.modalities import fit_modalities
from moemm.models import Model
from moemm.moe import ROUTERS, active_experts
from moemm.train.setup import train_values

PRIVATE = ("tokenizer", "norm", "head")
AUTO = "auto:0.5"
_EXPERTS = ("per_layer", "layers", "kind", "width")
_INITS = ("nearest", "most_used", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trying:
    """What the choices of a plan are measured with: samples of each task and split, and steps of a fit."""

    samples: int = 256
    steps: int = 40


def extended_data(base: Base, config: Config) -> tuple[Catalogue, Specs]:
    """Catalogue and specs of an extended run: those of the base, and of new modalities what their train split tells."""
    catalogue = build_catalogue(config.data, base=base.run.folder)
    new = [info for info in catalogue.modalities if info.name not in base.run.specs]
    options = {info.name: config.modalities[info.name] for info in new if info.name in config.modalities}
    fitted = fit_modalities(new, options, lambda name: train_values(catalogue, name))
    specs = {**base.run.specs, **fitted}
    return catalogue, {info.name: specs[info.name] for info in catalogue.modalities}


FASTER = 4.0
"""Times the run's learning rate, where only what is new is trained: nothing old can come to harm (docs/growth.md)."""


@dataclass(frozen=True, kw_only=True)  # without slots: cached_property wants a dict
class Choice:
    """What was asked of `extend.plan`, whose arguments these are, and how each part of the answer is found."""

    base: Base
    modality: str | None
    data: Path | str | None
    task: str | None
    label: str
    experts: Mapping[str, Any]
    init: str
    visible_to: tuple[str, ...] | None
    private: tuple[str, ...]
    unfreeze: bool
    replay: bool
    name: str | None
    options: Mapping[str, Any]
    training: Mapping[str, Any]
    trying: Trying
    tell: Callable[[str], None]

    def plan(self) -> Plan:
        """The plan. Raises ConfigError, DataError."""
        self._check()
        layers, shift, usage_LE = self._layers()
        addition = replace(self.addition, layers=layers)
        sources, zero_shot = self._sources(addition, usage_LE)
        config = self._configured(addition)
        catalogue, specs = extended_data(self.base, config)
        drawn = fresh_model(config, catalogue, specs).state_dict()
        check_shapes(self.base.weights, drawn)
        only = None if self.unfreeze else only_new(self.base.weights, drawn)
        config = replace(config, train=replace(config.train, only=only))
        return Plan(
            run=str(self.base.run.folder),
            base=weights_hash(self.base.weights),
            name=addition.name,
            modalities=addition.modalities,
            tasks=() if addition.task is None else (addition.task.name,),
            experts=expert_ids(addition),
            layers=layers,
            visible_to=self.visible,
            touched=self._touched if layers else (),
            unfrozen=self.unfreeze,
            sources=sources,
            config=to_dict(from_dict(to_dict(config), origin=f"the plan of {addition.name}")),
            measured={"router_shift": shift, "zero_shot_bits": zero_shot},
            changed=tuple(self._told(addition, sources, len(set(drawn) - set(self.base.weights)))),
        )

    @property
    def _model(self) -> Model:
        model = self.base.run.model
        assert isinstance(model, Model)
        return model

    def _check(self) -> None:
        config = self.base.run.config
        if config.model.moe != "sparse":
            raise ConfigError(
                f"{self.base.run.folder} has no MoE layers (model.moe: {config.model.moe}), and experts are what an "
                "extension adds\n  to do: make experts of its networks first (`moemm upcycle`), and extend that run"
            )
        unknown = [key for key in self.experts if key not in _EXPERTS]
        if unknown:
            hint = did_you_mean(unknown[0], _EXPERTS)
            raise ConfigError(f"experts: no option {unknown[0]!r}{hint}; allowed: {', '.join(_EXPERTS)}")
        wrong = [part for part in self.private if part not in PRIVATE]
        if wrong or not {"tokenizer", "head"} <= set(self.private):
            raise ConfigError(
                f"private is {listed(self.private) or 'empty'}; allowed: tokenizer and head, which an extension always "
                "has of its own, and norm"
            )
        if self.replay and not self.unfreeze:
            raise ConfigError("replay trains on old tasks, which changes nothing while all that is old is frozen; add "
                              "unfreeze, or leave replay out")  # fmt: skip
        if self._count < 0:
            raise ConfigError(f"experts.per_layer is {self._count}; allowed: 0 and more")
        if not self._count and self.data is None:
            raise ConfigError(
                "neither data nor experts: there is nothing to extend by; give data, or per_layer above 0"
            )

    # What the data brings ---------------------------------------------------------------------------------------------

    @cached_property
    def _old(self) -> list[str]:
        return [info.name for info in self.base.run.catalogue.modalities]

    @cached_property
    def _brought(self) -> tuple[TaskConfig | None, tuple[str, ...]]:
        """The new task, and the modalities that come with it."""
        if self.modality in self._old:
            raise ConfigError(
                f"modality {self.modality} exists in {self.base.run.folder}; it has {', '.join(self._old)}\n"
                "  to do: give the new one another name; leave `modality` out for a new task on known modalities, and "
                f"data too for more experts (visible_to: [{self.modality}])"
            )
        if self.data is None:
            if self.modality is not None or not self.visible_to:
                raise ConfigError(
                    "no data: a new modality or task is learned from a file (data, --data)\n"
                    "  allowed without data: more experts for modalities that the run has, with visible_to"
                )
            return None, ()
        with DataFile(self.data) as file:
            have, own_task, labels = [info.name for info in file.modalities], file.info.task, list(file.info.labels)
        if self.label not in labels:
            raise ConfigError(f"{self.data} has no label {self.label!r}{did_you_mean(self.label, labels)}; it has "
                              f"{', '.join(labels)}")  # fmt: skip
        new, rename = self._new_modalities(have)
        name = self.task or own_task
        if name in [task.name for task in self.base.run.catalogue.tasks]:
            raise ConfigError(f"task {name} exists in {self.base.run.folder}; give the new one another name (--task)")
        known = [one for one in have if one in self._old and one not in rename]
        task = TaskConfig(
            name=name, file=self._place(Path(self.data)), label=self.label, rename=rename, modalities=[*new, *known]
        )
        return task, new

    def _new_modalities(self, have: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
        """Names of the new modalities of the file's, and how they are renamed."""
        unknown = [name for name in have if name not in self._old]
        if self.modality is None or self.modality in have:
            return (tuple(unknown) if self.modality is None else (self.modality,)), {}
        meant = unknown or have  # the only one of a file may have the name of another thing in the run
        if len(meant) != 1:
            raise ConfigError(
                f"{self.data} has no modality {self.modality!r}{did_you_mean(self.modality, have)}\n"
                f"  it has: {', '.join(have)}; new to the run: {', '.join(unknown) or 'none'}\n"
                "  allowed: one of these; or any name where the file has one modality alone, or one new to the run"
            )
        if not NAME.fullmatch(self.modality):
            raise ConfigError(f"modality: {self.modality!r} is no name; allowed: {NAME.pattern}")
        return (self.modality,), {meant[0]: self.modality}

    def _place(self, path: Path) -> str:
        """The file as `data.root` sees it, if it is in there; else from the file system's root."""
        root = (self.base.run.folder / self.base.run.config.data.root).resolve()
        there = path.resolve()
        return os.path.relpath(there, root) if there.is_relative_to(root) else str(there)

    @cached_property
    def visible(self) -> tuple[str, ...]:
        """Modalities and tasks whose samples may use the new experts."""
        task, new = self._brought
        default = new or ((task.name,) if task else ())
        if task and not new and task.name in self._old:
            raise ConfigError(f"task {task.name} has the name of a modality; give it another one (--task)")
        given = self.visible_to or default
        known = [*self._old, *new, *(one.name for one in self.base.run.catalogue.tasks), *([task.name] if task else [])]
        for name in given:
            if name not in known:
                raise ConfigError(f"visible_to: no modality or task {name!r}{did_you_mean(name, known)}; known: "
                                  f"{', '.join(known)}")  # fmt: skip
        return tuple(given)

    @property
    def _touched(self) -> tuple[str, ...]:
        """Old tasks whose samples may use the new experts."""
        tasks = self.base.run.catalogue.tasks
        skills = {one for one in self.visible if one not in self._old and one not in self._brought[1]}
        named = set(self.visible) - skills
        return tuple(
            task.name
            for task in tasks
            if (not skills or task.name in skills) and (not named or named & set(task.modalities))
        )

    # The experts ------------------------------------------------------------------------------------------------------

    @property
    def _count(self) -> int:
        router = self.base.run.config.model.router
        alone = (active_experts(router) or 1) if router.scope == "disjoint" else 1
        return int(self.experts.get("per_layer", alone))

    @cached_property
    def addition(self) -> Addition:
        """What is added, without its layers."""
        task, new = self._brought
        kind = self.experts.get("kind") or ("modality" if self._model.map.of_role("hard") else "routed")
        if kind not in ("modality", "routed"):
            raise ConfigError(f"experts.kind is {kind!r}; allowed: modality, routed")
        name = self.name or (new[0] if len(new) == 1 else task.name if task else f"more_{self.visible[0]}")
        if not NAME.fullmatch(name):
            raise ConfigError(f"name: {name!r} is no name of an extension; allowed: {NAME.pattern}")
        return Addition(
            name=name, task=task, modalities=new, visible_to=self.visible, kind=kind, width=self._width(kind),
            count=max(1, self._count), layers=(),
            norms=bool(new) and "norm" in self.private and "norms" not in self.base.run.config.model.untie,
        )  # fmt: skip

    def _width(self, kind: str) -> int:
        widths: dict[str, int] = {
            e.kind: e.width for e in reversed(self._model.map.experts) if e.kind in ("modality", "routed")
        }
        given = self.experts.get("width") or widths.get(kind) or next(iter(widths.values()), None)
        if given is None:
            raise ConfigError("experts.width is missing: the run has no modality or routed expert whose width to take")
        return int(given)

    @cached_property
    def _known(self) -> Known:
        """What trials are made on; not for the model, which they each build."""
        config = extended(self.base.run.config, self._old, self.addition)
        catalogue, specs = extended_data(self.base, self._optioned(config))
        task, new = self._brought
        names = self._touched if task is None else (task.name,)
        need = tuple(one for one in self.visible if one in self._old) if task is None else new
        tasks = tuple(one for one in catalogue.tasks if one.name in names)
        trying, seed = self.trying, self.base.run.config.train.seed
        return Known(catalogue, specs, tasks, need, trying.samples, trying.steps, seed)

    def _trial(self, config: Config) -> Trial:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            return Trial(self._optioned(config), self._known, self.base.weights)

    # Layers -----------------------------------------------------------------------------------------------------------

    def _layers(self) -> tuple[tuple[int, ...], dict[str, float], torch.Tensor | None]:
        """The layers that get experts; by how much their routers shift, and what the new samples used, if asked for."""
        number, given = self.base.run.config.model.layers, self.experts.get("layers")
        if not self._count:
            return (), {}, None
        auto = given is None or (isinstance(given, str) and given.startswith("auto"))
        if not auto and self.init != "most_used":
            return self._named_layers(given, number), {}, None
        measured = self._usage()
        if measured is None and given is None:
            return tuple(range(number)), {}, None
        if measured is None:
            raise ConfigError(
                f"{f'layers {given}' if auto else 'init most_used'}: cannot be measured, because no joint router of "
                "this run serves what is new before it has experts\n"
                "  allowed: a model with routed experts that are open to it, scope joint, a kind that learns\n"
                "  to do: name layers (all, or numbers), and give another init"
            )
        old_LE, new_LE = measured
        shift = router_shift(old_LE, new_LE, list(self._model.trunk.routed_layers))
        for layer, value in shift.items():
            self.tell(f"layer {layer}: the router shifts by {value:.4f}")
        chosen = most_shifted(shift, _share(given or AUTO)) if auto else self._named_layers(given, number)
        return chosen, {str(layer): value for layer, value in shift.items()}, new_LE

    def _named_layers(self, given: Any, number: int) -> tuple[int, ...]:
        text = given if isinstance(given, str) else ",".join(map(str, given))
        try:
            return parse_layers(text, number)
        except ValueError as error:
            raise ConfigError(f"experts.layers: {text!r} {error}; or auto:SHARE, as {AUTO}") from error

    def _usage(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(L, E) what old and new samples choose of the old routed experts; None where that cannot be measured."""
        router = self.base.run.config.model.router
        kind = ROUTERS.get(router.kind)
        if not self._model.trunk.routed_layers or router.scope != "joint" or kind is None or not kind.learned:
            return None
        try:
            trial = self._trial(extended(self.base.run.config, self._old, self.addition))
        except ConfigError:
            return None  # what is new reaches too few experts before it has its own
        trial.fit()
        return usage(self._model, old_batches(self.base)), trial.usage()

    # Copies -----------------------------------------------------------------------------------------------------------

    def _sources(
        self, addition: Addition, usage_LE: torch.Tensor | None
    ) -> tuple[dict[str, dict[str, str]], dict[str, float]]:
        """New expert -> layer -> old expert; and the bits that were measured through each old one."""
        if not addition.layers or self.init == "random":
            return {}, {}
        old = [e.id for e in candidates(self._model.map, addition.layers, addition.width)]
        ids, layers = expert_ids(addition), [str(layer) for layer in addition.layers]
        if not old:
            widths = sorted({e.width for e in self._model.map.experts if e.width})
            raise ConfigError(
                f"init {self.init}: no old expert of width {addition.width} stands in all of the layers "
                f"{', '.join(layers)}, so that none can be copied\n"
                f"  widths of the run: {', '.join(map(str, widths))}\n  to do: give another width, or init random"
            )
        if self.init == "most_used":
            assert usage_LE is not None
            return self._most_used(ids, layers, old, usage_LE), {}
        if self.init not in _INITS:
            if self.init not in old:
                raise ConfigError(
                    f"init: no expert {self.init!r} of width {addition.width} stands in the layers {', '.join(layers)}"
                    f"{did_you_mean(self.init, old)}\n  allowed: {', '.join((*_INITS, *old))}"
                )
            return {name: dict.fromkeys(layers, self.init) for name in ids}, {}
        bits = self._zero_shot(addition, old)
        ranked = sorted(old, key=lambda name: (bits[name], old.index(name)))
        found = {name: dict.fromkeys(layers, ranked[place % len(ranked)]) for place, name in enumerate(ids)}
        return found, bits

    def _most_used(
        self, ids: Sequence[str], layers: Sequence[str], old: Sequence[str], usage_LE: torch.Tensor
    ) -> dict[str, dict[str, str]]:
        routed = [e.id for e in self._model.map.of_role("routed")]
        numbers = list(self._model.trunk.routed_layers)
        found: dict[str, dict[str, str]] = {name: {} for name in ids}
        for layer in (layer for layer in layers if int(layer) in numbers):
            used = dict(zip(routed, usage_LE[numbers.index(int(layer))].tolist(), strict=True))
            ranked = sorted((name for name in routed if name in old), key=lambda name: (-used[name], name))
            for place, name in enumerate(ids if ranked else ()):
                found[name][layer] = ranked[place % len(ranked)]
        return found

    def _zero_shot(self, addition: Addition, old: Sequence[str]) -> dict[str, float]:
        """Old expert -> bits that are left open where all tokens of the new samples run through its copy."""
        config = extended(self.base.run.config, self._old, addition)
        through = ExpertGroupConfig(**{**vars(config.model.experts.groups[-1]), "kind": "modality", "count": 1,
                                       "id": f"{addition.name}_trial"})  # fmt: skip
        groups = [*config.model.experts.groups, through]
        experts = replace(config.model.experts, groups=groups)
        trial = self._trial(replace(config, model=replace(config.model, experts=experts)))
        assert through.id is not None
        found = {}
        for name in old:
            copies = {through.id: dict.fromkeys([str(layer) for layer in addition.layers], name)}
            trial.fit(lambda weights, copies=copies: start(weights, copies))  # type: ignore[misc]
            found[name] = trial.bits()
            self.tell(f"through {name}: {found[name]:.4f} bits")
        return found

    # The configuration ------------------------------------------------------------------------------------------------

    def _optioned(self, config: Config) -> Config:
        """With the options of the new modality's tokenizer."""
        _, new = self._brought
        if not self.options:
            return config
        if len(new) != 1:
            raise ConfigError("options are those of the tokenizer of the one new modality; there is "
                              f"{'none' if not new else ', '.join(new)}")  # fmt: skip
        unknown = [key for key in self.options if key not in ModalityConfig.__dataclass_fields__]
        if unknown:
            raise ConfigError(f"options: a modality has no option {unknown[0]!r}; allowed: "
                              f"{', '.join(ModalityConfig.__dataclass_fields__)}")  # fmt: skip
        return replace(config, modalities={**config.modalities, new[0]: ModalityConfig(**self.options)})

    def _configured(self, addition: Addition) -> Config:
        config = self._optioned(extended(self.base.run.config, self._old, addition))
        drawn = set(() if addition.task else self._touched)
        old = {task.name for task in self.base.run.catalogue.tasks}
        tasks = [replace(task, learn=task.learn and (task.name not in old or self.replay or task.name in drawn))
                 for task in config.data.tasks]  # fmt: skip
        tasks = [replace(task, learn=True) if task.name in drawn else task for task in tasks]
        unknown = [key for key in self.training if not hasattr(config.train, key)]
        if unknown:
            known = list(vars(config.train))
            raise ConfigError(f"training: `train` has no key {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        values = {"steps": None, "epochs": None, **self.training} if {"steps", "epochs"} & set(self.training) else {}
        given = {"lr": self._rate, **self.training, **values}
        trained = replace(config.train, init=None, only=None, **given)
        return replace(config, data=replace(config.data, tasks=tasks), train=trained)

    @property
    def _rate(self) -> float:
        """The peak learning rate when none is given: higher where only what is new learns.

        The run of an extension has a higher one already.
        """
        config = self.base.run.config
        alone = not self.unfreeze and not config.model.extensions
        return config.train.lr * (FASTER if alone else 1.0)

    def _told(self, addition: Addition, sources: Mapping[str, Mapping[str, str]], tensors: int) -> list[str]:
        task, new = self._brought
        lines = [f"modality {name}: tokenizer and embedding" + (", norms" if addition.norms else "") for name in new]
        lines += [f"task {task.name}: query and head"] if task else []
        where = ", ".join(map(str, addition.layers))
        for name in expert_ids(addition):
            of = ", ".join(dict.fromkeys(sources.get(name, {}).values()))
            origin = f"a copy of {of}" if of else "drawn"
            at_first = ", adds nothing at first" if task is None and addition.kind == "modality" else ""
            what = f"expert {name} ({addition.kind}, width {addition.width}) in layers {where}"
            lines.append(f"{what}: {origin}{at_first}; for {', '.join(self.visible)}")
        lines.append(
            f"{tensors} new tensors; " + ("all parts are trained" if self.unfreeze else "they alone are trained")
        )
        if "lr" not in self.training and self._rate != self.base.run.config.train.lr:
            lines.append(f"they learn {FASTER:g} times as fast as the run did: train.lr is {self._rate:g}")
        return lines


def _share(text: str) -> float:
    """The share in `auto:0.5`. Raises ConfigError."""
    word, colon, number = text.partition(":")
    try:
        share = float(number) if colon else 0.5
    except ValueError:
        share = 0.0
    if word != "auto" or not 0.0 < share <= 1.0:
        raise ConfigError(f"experts.layers: {text!r} is no share of the layers; allowed: auto:0.5, above 0 up to 1")
    return share
