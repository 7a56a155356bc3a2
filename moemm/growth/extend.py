"""Extending a trained run: a modality, a task or experts more, and what was there before stays as it was.

plan = extend.plan("runs/base", modality="spectrum", data="spectra.h5")
receipt = extend.apply(plan, output="runs/grown")
receipt.verify()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moemm.config import Config, LoadedConfig, from_dict, load_config, to_dict
from moemm.config.suggest import did_you_mean
from moemm.data.build import build_catalogue
from moemm.errors import ConfigError
from moemm.growth import extension as parts
from moemm.growth.extension import Plan
from moemm.growth.extension_choice import PRIVATE, Choice, Trying, extended_data
from moemm.growth.extension_proof import OPERATION, Extension, changed_outputs, compare, read_extension, rewrite, scores
from moemm.growth.grown import Base, check_target, fresh_model, read_base, size_of, write_grown
from moemm.growth.package import remove_extension
from moemm.growth.receipt import Proof, Receipt, lineage, weights_hash
from moemm.plugins import load_plugins
from moemm.train import train
from moemm.train.setup import CONFIG

__all__ = ["Extension", "Plan", "Trying", "apply", "check", "plan", "remove"]
Tell = Callable[[str], None]


def plan(
    run: Path | str,
    *,
    modality: str | None = None,
    data: Path | str | None = None,
    task: str | None = None,
    label: str = "label",
    experts: Mapping[str, Any] | None = None,
    init: str = "nearest",
    visible_to: Sequence[str] | None = None,
    private: Sequence[str] = PRIVATE,
    unfreeze: bool = False,
    replay: bool = False,
    name: str | None = None,
    options: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    trying: Trying | None = None,
    plugins: Sequence[Path | str] = (),
    tell: Tell = lambda line: None,
) -> Plan:
    """Decide how to extend a run. Reads it and the data, and writes nothing; the same plan for the same input.

    modality: name of the new one; that of the file, if it has one that the run has not, when not given. data: file of
    samples with it; without it the run gets experts alone, for the old modalities of `visible_to`. task, label: name of
    the new task (the file's own when not given) and data set of its target.
    experts: `per_layer` (1; 0 for none), `layers` ("auto:0.5": that share of the layers whose routers shift most
    between old and new samples; "all", or numbers), `kind` ("modality" or "routed") and `width` (those of the base).
    init: what they are copies of: "nearest", the old expert through which the new samples cost fewest bits;
    "most_used" by them, in each layer; "random", no copy; or the id of an expert.
    visible_to: modalities (or the new task) whose samples may use them: those that are new, when not given.
    private: "norm" gives new modalities norms of their own; tokenizer and head are private in any case.
    unfreeze: all parts move, so that old tasks may be forgotten; replay: old tasks are trained on, too.
    options: of the new modality's tokenizer; training: keys of `train` with other values than the base's.
    plugins: Python files that what is new needs, a kind of your own say; the plan names them.
    Raises ConfigError, DataError, CheckpointError.
    """
    with torch.random.fork_rng(devices=[]):
        base = read_base(run, plugins=plugins)
    choice = Choice(
        base=base, modality=modality, data=data, task=task, label=label, experts=dict(experts or {}), init=init,
        visible_to=None if visible_to is None else tuple(visible_to), private=tuple(private), unfreeze=unfreeze,
        replay=replay, name=name, options=dict(options or {}), training=dict(training or {}),
        trying=trying or Trying(), tell=tell,
    )  # fmt: skip
    return choice.plan()


def apply(
    plan: Plan, *, output: Path | str | None = None, training: bool = True, plugins: Sequence[Path | str] = (),
    tell: Tell = lambda line: None,
) -> Extension:  # fmt: skip
    """Write the extended run, train what is new in this process, and prove what became of the old parts.

    output: its folder; that of the base with -NAME behind it when not given. training: False writes the run alone;
    `moemm train OUTPUT/config.yaml --resume` behind a launcher trains it, and `check` then renews the receipt.
    plugins: in place of those that the plan names, which run only where this user has run the same bytes before.
    Raises ConfigError: a folder that holds a run, a plan of another checkpoint. CheckpointError, DataError.
    """
    base = read_base(plan.run, plugins=plugins)
    if weights_hash(base.weights) != plan.base:
        raise ConfigError(
            f"the plan of {plan.name} was made for another checkpoint than the one in {plan.run}\n"
            f"  given: sha256 {weights_hash(base.weights)[:12]}, step {base.run.step}\n"
            f"  allowed: sha256 {plan.base[:12]}\n  to do: plan again"
        )
    folder = Path(output or f"{str(plan.run).rstrip('/')}-{plan.name}")
    check_target(folder)
    config = from_dict(plan.config, origin=f"the plan of {plan.name}")
    config = replace(
        config, train=replace(config.train, output=str(folder)),
        plugins=base.run.config.plugins if plugins else config.plugins,
    )  # fmt: skip
    loaded = LoadedConfig(config=config, path=base.run.folder / CONFIG, source={}, origins={})
    load_plugins(loaded, stored=True)
    catalogue, specs = extended_data(base, config)
    model = fresh_model(config, catalogue, specs)
    model.load_state_dict(_started(base, model.state_dict(), plan))
    receipt = Extension(
        operation=OPERATION, sources=[base.as_source()], target=str(folder), changed=list(plan.changed), proofs=[],
        before=size_of(base.run.model), after=size_of(model),  # type: ignore[arg-type]
        optimizer="not kept: it has states for what is trained now alone",
        details={**_details(plan), "base_config": to_dict(_own_config(base))}, history=lineage(base.run.folder),
    )  # fmt: skip
    write_grown(loaded, catalogue, specs, model, receipt)
    receipt.details["changed_at_first"] = changed_outputs(base, read_base(folder, plugins=plugins), plan.touched)
    rewrite(receipt)
    if training:
        tell(f"training what is new for {plan.name}")
        if train(load_config(folder / CONFIG), resume=True)["exit_code"]:
            tell(f"stopped; go on with moemm train {folder / CONFIG} --resume, then moemm extend check {folder}")
    return check(folder, plugins=plugins)


def check(folder: Path | str, *, plugins: Sequence[Path | str] = ()) -> Extension:
    """Compare an extended run, trained or not, with its base, and write what is found into its receipt.

    plugins: as `read_base` takes them, for both runs.
    Raises CheckpointError for a run that is none, or whose base is not there any more.
    """
    receipt = read_extension(Path(folder))
    receipt = replace(receipt, target=str(folder))
    base, grown = (read_base(one, plugins=plugins) for one in (receipt.sources[0]["folder"], folder))
    first = Proof(
        what="base checkpoints that are not the one it was extended from",
        value=int(weights_hash(base.weights) != receipt.sources[0]["sha256"]), most=0,
    )  # fmt: skip
    at_first = Proof(
        what="old outputs that changed a bit right after the extension",
        value=receipt.details["changed_at_first"], most=0,
    )  # fmt: skip
    found = [first, at_first, *compare(base, grown, receipt.details), *scores(base, grown, receipt.details)]
    receipt = replace(receipt, proofs=found)
    rewrite(receipt)
    return receipt


def remove(run: Path | str, name: str, *, output: Path | str, plugins: Sequence[Path | str] = ()) -> Receipt:
    """Write the run without an extension; if it is the last, the weights of before to the bit, as its receipt says.

    One that others came after, or that a package brought, goes as `package.remove_extension` has it.
    plugins: as `read_base` takes them; the run keeps those that the extension came with.
    Raises ConfigError: no such extension, or one that others need. CheckpointError.
    """
    base = read_base(run, plugins=plugins)
    config = base.run.config
    names = [one.name for one in config.model.extensions]
    if name not in names:
        have = f"; it has {', '.join(names)}{did_you_mean(name, names)}" if names else "; it has none"
        raise ConfigError(f"{run} has no extension {name!r}{have}")
    history = lineage(base.run.folder)
    made = _made(history, names)
    if name != names[-1] or made is None:
        return remove_extension(run, name, output=output, plugins=plugins)
    before = from_dict(made["details"]["base_config"], origin=f"the run before {name}")
    before = replace(
        before, train=replace(before.train, output=str(output)), data=_roots(before, config), plugins=config.plugins
    )
    loaded = LoadedConfig(config=before, path=base.run.folder / CONFIG, source={}, origins={})
    catalogue = build_catalogue(before.data, base=base.run.folder)
    specs = {info.name: base.run.specs[info.name] for info in catalogue.modalities}
    model = fresh_model(before, catalogue, specs)
    kept = {key: base.weights[key] for key in model.state_dict()}
    model.load_state_dict(kept)
    same = weights_hash(kept) == made["sources"][0]["sha256"]
    receipt = Receipt(
        operation=f"{OPERATION} remove", sources=[base.as_source()], target=str(output),
        changed=[f"removed {name}: {len(base.weights) - len(kept)} tensors"],
        proofs=[Proof(what="weights whose sha256 is not that of before", value=int(not same),
                      most=None if made["details"]["unfrozen"] else 0)],
        before=size_of(base.run.model), after=size_of(model),  # type: ignore[arg-type]
        optimizer="not kept", details={"name": name}, history=history,
    )  # fmt: skip
    write_grown(loaded, catalogue, specs, model, receipt)
    return receipt


def _made(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    """The receipt of the last of these extensions, if it came to a run with all others of them."""
    for one in reversed(history):
        if one["operation"] == OPERATION and one["details"]["name"] == names[-1]:
            before = [extension["name"] for extension in one["details"]["base_config"]["model"]["extensions"]]
            return dict(one) if before == list(names[:-1]) else None
    return None


def _roots(before: Config, now: Config) -> Any:
    """The data section of before, with its root as seen from the run that is there now."""
    return replace(before.data, root=now.data.root)


def _own_config(base: Base) -> Config:
    """The base's configuration as it stands in its folder, without plugins that came with the extension."""
    return load_config(base.run.folder / CONFIG).config


def _details(plan: Plan) -> dict[str, Any]:
    values = plan.to_dict()
    return {key: value for key, value in values.items() if key not in ("config", "run", "base", "changed", "format")}


def _started(base: Base, drawn: Mapping[str, torch.Tensor], plan: Plan) -> dict[str, torch.Tensor]:
    """The first weights of the extended run."""
    weights = parts.share_norms({**drawn, **base.weights}, plan.modalities)
    weights = parts.start(weights, plan.sources)
    hard = plan.config["model"]["experts"]["groups"][-1]["kind"] == "modality"
    return parts.silenced(weights, plan.experts) if hard and not plan.tasks else weights
