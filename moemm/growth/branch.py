"""Branch-train-mix (arXiv:2403.07816): several dense runs, each on data of its own -> the experts of one model.

Each run's dense network becomes a routed expert; of all else the mean is taken over the runs that have it. They should
have begun with the same weights (`train.init`): the mean of others means nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch

from moemm.config import Config, DataConfig, ModalityConfig, TaskConfig
from moemm.config.schema import ExpertGroupConfig, RouterConfig
from moemm.data.build import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.growth.alike import first_difference
from moemm.growth.deal import Portion
from moemm.growth.dense import NETWORK, DenseLayer, Units, dense_layers
from moemm.growth.grown import Base, Specs, fresh_model
from moemm.growth.receipt import lineage
from moemm.growth.rules import Rule, Tensors, To, apply_rules
from moemm.growth.upcycling import Made, Start, Wanted, settled
from moemm.modalities import ModalitySpec
from moemm.models import Model
from moemm.train.init import OF_THE_RUN

_OF_THE_RUN = tuple(f"{prefix}{{rest*}}" for prefix in OF_THE_RUN)
_SAME = ("model", "objectives", "harmonize")


def join_runs(bases: Sequence[Base]) -> Start:
    """The runs as one dense model on the data of all, with the mean of their weights.

    Raises ConfigError where their models, objectives or what they learned of a modality differ, where two tasks of one
    name are not the same, and where a run is sparse.
    """
    runs = [base.run for base in bases]
    for run in runs[1:]:
        for key in _SAME:
            if getattr(run.config, key) != getattr(runs[0].config, key):
                raise ConfigError(
                    f"{run.folder} and {runs[0].folder} differ in their section `{key}`; runs whose weights are "
                    "averaged must be of one architecture and objective"
                )
    config = replace(
        runs[0].config, name="branch-train-mix", data=_joint_data(bases), modalities=_modalities(bases),
        plugins=_plugins(bases),
    )  # fmt: skip
    config = settled(replace(config, train=replace(config.train, init=None)))
    catalogue = build_catalogue(config.data, base=runs[0].folder)
    specs = _specs(bases, catalogue)
    model = fresh_model(config, catalogue, specs)
    source = _named(bases)
    rules = [*_mean_rules(bases, model.state_dict()), *_run_rules()]
    weights, taken = apply_rules(rules, source, model.state_dict())
    model.load_state_dict(weights)
    return Start(
        config=config, catalogue=catalogue, specs=specs, model=model.eval(), weights=weights,
        path=runs[0].folder / "config.yaml", sources=[base.as_source() for base in bases],
        history=[one for run in runs for one in lineage(run.folder)],
        notes=[f"mean over {len(bases)} runs: {line}" for line in taken.lines()],
    )  # fmt: skip


def branch(bases: Sequence[Base], start: Start, wanted: Wanted, output: Path, batches: Sequence[PackedBatch]) -> Made:
    """One routed expert a run. Two or more of them a token are weighted by a softmax over those that were chosen."""
    del batches
    layers = [
        dense_layers(b.run.config, cast(Model, b.run.model).map, b.weights, where=str(b.run.folder)) for b in bases
    ]
    config = routed_config(start.config, len(bases), layers[0][0].units, wanted.top_k, output)
    model = fresh_model(config, start.catalogue, start.specs)
    rules = [*expert_rules(layers, model), *_mean_rules(bases, model.state_dict())]
    weights, _ = apply_rules([*rules, *_run_rules()], _named(bases), model.state_dict())
    model.load_state_dict(weights)
    changed = [f"routed_{n} holds the dense network of {base.run.folder}" for n, base in enumerate(bases)]
    return Made(config=config, model=model.eval(), changed=changed, exact=False)


def routed_config(start: Config, count: int, width: int, top_k: int | None, output: Path) -> Config:
    """The configuration of a dense model with routed experts in place of its network; a token uses 2 when not given.

    Raises ConfigError for a top_k of more than `count`.
    """
    top_k = min(2, count) if top_k is None else top_k
    if top_k > count:
        raise ConfigError(f"--top-k {top_k}: there are {count} experts, one for each run; allowed: 1 to {count}")
    group = ExpertGroupConfig(kind="routed", count=count, width=width)
    router = RouterConfig(top_k=top_k, gates="renormalised" if top_k > 1 else "straight_through")
    sparse = replace(start.model, moe="sparse", router=router, experts=replace(start.model.experts, groups=[group]))
    train = replace(start.train, output=str(output), init=None)
    return settled(replace(start, name=f"{start.name}-{count}", model=sparse, train=train))


def expert_rules(layers: Sequence[Sequence[DenseLayer]], model: Model) -> Iterator[Rule]:
    """run N's dense network of each layer (its tensors are named run0.NAME and so on) -> expert N."""
    halves = 2 if model.config.activation == "swiglu" else 1
    experts = [expert.id for expert in model.map.of_role("routed")]
    for number, (own, expert) in enumerate(zip(layers, experts, strict=True)):
        for layer, network in enumerate(own):
            place = f"{NETWORK.format(layer)}.experts.{expert}"
            for matrix in ("w1_FD", "w2_DF"):
                sources = tuple(f"run{number}.{name}.{matrix}" for name in network.names)
                yield Rule(sources, (To(f"{place}.{matrix}", Units(Portion(0, network.units), matrix, halves, place)),))


def _mean_rules(bases: Sequence[Base], target: Tensors) -> Iterator[Rule]:
    """Each tensor of the target that some run has, by the mean over those runs."""
    for name, value in target.items():
        owners = [n for n, base in enumerate(bases) if name in base.weights and not name.startswith(OF_THE_RUN)]
        sources = tuple(f"run{n}.{name}" for n in owners)
        if sources and all(bases[n].weights[name].shape == value.shape for n in owners):
            yield Rule(sources, (To(name, _mean),))


def _run_rules() -> Iterator[Rule]:
    sources = tuple(f"run{{n}}.{one}" for one in _OF_THE_RUN)
    yield Rule(sources, (), "it is about one run's losses")
    yield Rule((), tuple(To(one) for one in _OF_THE_RUN), "no run has had these losses")
    yield Rule((), (To("trunk.blocks.{i}.ffn.router.{rest*}"),), "the sources have no router")
    yield Rule((), (To("missing.rows.{a}.{b}"),), "no run had both modalities")


def _named(bases: Sequence[Base]) -> dict[str, torch.Tensor]:
    """All weights, as run0.NAME, run1.NAME ..."""
    return {f"run{n}.{name}": value for n, base in enumerate(bases) for name, value in base.weights.items()}


def _mean(sources: Sequence[torch.Tensor], fresh: torch.Tensor) -> torch.Tensor:
    del fresh
    return torch.stack([source.double() for source in sources]).mean(0)


def _plugins(bases: Sequence[Base]) -> list[str]:
    """Those of all runs, of one name (a copy's has the hash of its bytes) the first."""
    files = [Path(os.path.abspath(base.run.folder / name)) for base in bases for name in base.run.config.plugins]
    return list({file.name: str(file) for file in reversed(files)}.values())[::-1]


def _joint_data(bases: Sequence[Base]) -> DataConfig:
    """The tasks of all runs, with the places of their files written out where the runs' roots differ.

    A task is learned from where one of the runs did.
    """
    roots = {(base.run.folder / base.run.config.data.root).resolve() for base in bases}
    found: dict[str, tuple[TaskConfig, Path]] = {}
    for base in bases:
        root = base.run.folder / base.run.config.data.root
        for task in base.run.config.data.tasks:
            known = replace(task, file=os.path.normpath(root.resolve() / task.file))
            other, folder = found.setdefault(task.name, (known, base.run.folder))
            if replace(other, learn=task.learn) != known:
                raise ConfigError(
                    f"task {task.name} is another one in {folder} than in {base.run.folder}: {other} and {known}"
                )
            found[task.name] = replace(other, learn=other.learn or task.learn), folder
    tasks = [task for task, _ in found.values()]
    if len(roots) == 1:
        root = roots.pop()
        tasks = [replace(task, file=os.path.relpath(task.file, root)) for task in tasks]
    return replace(bases[0].run.config.data, tasks=tasks)


def _modalities(bases: Sequence[Base]) -> dict[str, ModalityConfig]:
    """Their options; what two runs say of one modality is compared in `_specs`."""
    return {name: options for base in bases for name, options in base.run.config.modalities.items()}


def _specs(bases: Sequence[Base], catalogue: Catalogue) -> Specs:
    found: dict[str, ModalitySpec] = {}
    for base in bases:
        for name, spec in base.run.specs.items():
            other = first_difference(asdict(found.get(name, spec)), asdict(spec), name)
            if other is not None:
                place, before, now = other
                raise ConfigError(
                    f"modality {name} has another tokenizer or statistics in {base.run.folder}: {place} is {now}, "
                    f"and {before} in the runs before it\n"
                    "  to do: train the runs from one start, which `train.init` takes over"
                )
            found[name] = spec
    return {info.name: found[info.name] for info in catalogue.modalities}
