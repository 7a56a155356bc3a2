"""Where losses pull a run's parameters apart: cosines of their gradients, by part of the model and checkpoint.

T losses, M modalities, N batches.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from moemm.analyze.gradients import Part, Products, Seen, cosines, products, tapped
from moemm.analyze.grouping import parameters
from moemm.analyze.split import atoms, lasting, propose, separate
from moemm.checkpoint import verify
from moemm.checkpoint.store import load_weights
from moemm.config import Config, LoadedConfig, save_config
from moemm.config.check_objectives import is_on, label_free
from moemm.data import train_loader
from moemm.data.sample import PackedBatch
from moemm.errors import CheckpointError, ConfigError
from moemm.evaluate import TrainedRun
from moemm.modalities import prepare_functions
from moemm.models import Model, ModelOutput
from moemm.objectives import supervised_losses

Rows = Mapping[str, torch.Tensor]
Pick = Callable[[Rows, PackedBatch], tuple[Rows, Rows]]
"""Outputs of the tasks and a batch -> outputs and targets of the rows whose labels are used."""
Tell = Callable[[str], None]
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """batches: of the training mixture, of `samples` samples each."""

    batches: int = 16
    samples: int = 64


def kept(folder: Path) -> tuple[list[tuple[int, Path]], list[str]]:
    """(step, folder) of the complete checkpoints of a run, oldest first, and what is wrong with the others.

    Raises CheckpointError where none is complete.
    """
    found, skipped = [], []
    for path in sorted(path for path in (folder / CHECKPOINTS).glob("step_*") if not path.suffix):
        try:
            found.append((verify(path).step, path))
        except CheckpointError as error:
            skipped.append(str(error))
    if not found:
        raise CheckpointError(f"{folder} has no complete checkpoint: {'; '.join(skipped) or 'none was saved'}")
    return found, skipped


def analyze_conflict(
    run: TrainedRun, pick: Pick, sampling: Sampling, *, tell: Tell = lambda line: None
) -> dict[str, Any]:
    """What a run's losses did to each other, as JSON types; the same batches and draws at every checkpoint.

    {"run", "batches", "samples", "seed", "losses", "steps", "skipped", "parts": [{"layer", "kind", "name", "title",
    "losses": [a, b], "cos", "deviation", "error", "opposed", "batches", "same"}], "modalities": [likewise, with
    "modality"]}; the lists have a value for each step, None where the two losses do not meet. cos is the mean over
    batches, deviation that of one batch, error that of the mean, opposed the share of batches under 0, same the part
    of cos from products within each modality. tell: gets a line for each checkpoint.
    The model is left with the weights of the newest one. Raises ConfigError for a run with one loss.
    """
    model, losses = cast(Model, run.model), losses_of(run)
    checkpoints, skipped = kept(run.folder)
    batches = _batches(run, sampling)
    by_step: list[list[dict[Part, Seen]]] = []
    fork, model.fork = model.fork, None  # it would weigh the gradients
    try:
        for number, (step, path) in enumerate(checkpoints, start=1):
            load_weights(model, path)
            by_step.append(_of_checkpoint(run, losses, pick, batches))
            tell(f"{number} of {len(checkpoints)}: step {step}")
    finally:
        model.fork = fork
        model.eval()
    return {
        "run": str(run.folder),
        "batches": sampling.batches,
        "samples": sampling.samples,
        "seed": run.config.train.seed,
        "losses": losses,
        "steps": [step for step, _ in checkpoints],
        "skipped": skipped,
        **_summary(by_step, losses, list(model.map.modalities)),
    }


def losses_of(run: TrainedRun) -> list[str]:
    """Names of the losses whose gradients are told apart: tasks, `objective NAME` of those without labels.

    Raises ConfigError where there is one.
    """
    objectives = run.config.objectives
    found = [task.name for task in run.catalogue.tasks] if is_on(objectives.supervised) else []
    found += [f"objective {name}" for name in label_free(objectives)]
    if len(found) < 2:
        raise ConfigError(
            f"{run.folder} has one loss, {found[0]}: there is nothing for it to be in conflict with\n"
            "  allowed: runs with several tasks in data.tasks, or objectives without labels beside them\n"
            "  to do: give the folder of such a run"
        )
    return found


def _batches(run: TrainedRun, sampling: Sampling) -> list[PackedBatch]:
    """The first batches of the run's mixture, with the modality dropout that it ends with."""
    config = run.config
    data = replace(config.data, num_workers=0, modality_dropout_start=None, modality_dropout_over=None)
    train = replace(config.train, batch_size=sampling.samples, accumulation=1)
    plan = replace(config, data=data, train=train)
    with train_loader(run.catalogue, plan, prepare=prepare_functions(run.specs)) as loader:
        return list(itertools.islice(loader, sampling.batches))


def _of_checkpoint(
    run: TrainedRun, losses: Sequence[str], pick: Pick, batches: Sequence[PackedBatch]
) -> list[dict[Part, Seen]]:
    """What each batch shows. As in training, with dropout and noise; their draws follow from seed and batch alone."""
    model = cast(Model, run.model)
    model.train()
    groups = atoms(run.config, model)
    found = []
    with torch.random.fork_rng(devices=[]):
        for number, batch in enumerate(batches):
            torch.manual_seed(run.config.train.seed + number)
            if model.pretext is not None:
                model.pretext.step = number
            with tapped(model) as taps:
                output = model(batch)
            by_name = _losses(run, output, batch, pick)
            own = products(model, {name: by_name[name] for name in losses}, taps)
            found.append({part: cosines(parts) for part, parts in _with_sums(own, groups).items()})
    return found


def _losses(run: TrainedRun, output: ModelOutput, batch: PackedBatch, pick: Pick) -> dict[str, torch.Tensor | None]:
    """Each loss, summed over its samples; None where the batch has none of it."""
    tasks, smoothing = run.catalogue.tasks, run.config.train.label_smoothing
    picked = [pick(outputs, batch) for outputs in (output.outputs, *output.earlier)]
    every = [supervised_losses(*one, tasks, label_smoothing=smoothing) for one in picked]
    found: dict[str, torch.Tensor | None] = {}
    for task in tasks:
        has = len(picked[0][1][task.name])
        found[task.name] = torch.stack([one[task.name] for one in every]).mean() if has else None
    for name, (loss, count) in output.pretext.items():
        found[f"objective {name}"] = loss if float(count) and loss.requires_grad else None
    return found


def _with_sums(own: Mapping[Part, Products], groups: Mapping[Part, Sequence[str]]) -> dict[Part, list[Products]]:
    """Each part, and besides the sums: `group`s of several experts, all experts of a layer, the whole layer."""
    found = {part: [one] for part, one in own.items()}
    for group, names in groups.items():
        members = [own[Part(group.layer, "expert", name)] for name in names if Part(group.layer, "expert", name) in own]
        if len(members) > 1:
            found[group] = members
    for layer in sorted({part.layer for part in own if part.layer is not None}):
        experts = [one for part, one in own.items() if part.layer == layer and part.kind in ("expert", "ffn")]
        if experts:
            found[Part(layer, "experts")] = experts
        found[Part(layer, "layer")] = [one for part, one in own.items() if part.layer == layer]
    return found


def _summary(
    by_step: Sequence[Sequence[Mapping[Part, Seen]]], losses: Sequence[str], modalities: Sequence[str]
) -> dict[str, Any]:
    """The lists `parts` and `modalities`, without pairs that never meet."""
    parts, by_modality = [], []
    for part in sorted(by_step[-1][0], key=_order):
        seen_XN = [[batch[part] for batch in step] for step in by_step]
        for (i, a), (j, b) in itertools.combinations(enumerate(losses), 2):
            named = {**part._asdict(), "title": part.title, "losses": [a, b]}
            cos = [_statistics([seen.cos_TT[i, j] for seen in step]) for step in seen_XN]
            if any(one["batches"] for one in cos):
                same = [_mean([one.same_TT[i, j] for one in step if one.same_TT is not None]) for step in seen_XN]
                parts.append({**named, **_columns(cos), "same": same})
            if part.kind not in ("experts", "expert", "group"):
                continue
            for number, modality in enumerate(modalities):
                own = [_statistics([s.by_MTT[number, i, j] for s in step if s.by_MTT is not None]) for step in seen_XN]
                if any(one["batches"] for one in own):
                    by_modality.append({**named, "modality": modality, **_columns(own)})
    return {"parts": parts, "modalities": by_modality}


def _order(part: Part) -> tuple[float, int, str]:
    kinds = ("tokenizer", "missing", "latents", "layer", "attention", "norm", "experts", "group", "expert", "ffn",
             "router", "pool")  # fmt: skip
    outside = math.inf if part.kind == "pool" else -1.0
    return outside if part.layer is None else float(part.layer), kinds.index(part.kind), part.name


def _statistics(values: Sequence[float]) -> dict[str, float | int | None]:
    """Over the batches in which both losses are."""
    known = np.asarray([value for value in values if math.isfinite(value)])
    if not len(known):
        return {"cos": None, "deviation": None, "error": None, "opposed": None, "batches": 0}
    deviation = float(known.std(ddof=1)) if len(known) > 1 else None
    return {
        "cos": float(known.mean()),
        "deviation": deviation,
        "error": None if deviation is None else deviation / math.sqrt(len(known)),
        "opposed": float((known < 0).mean()),
        "batches": len(known),
    }


def _columns(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {key: [one[key] for one in steps] for key in steps[0]}


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else None


def decide(run: TrainedRun, values: Mapping[str, Any], *, least: float = 0.0) -> tuple[dict[str, Any], Config | None]:
    """{"lasting", "remedies", "parameters": {"before", "after"} or None, "refused"} and the configuration to train.

    It is None where nothing lasts, where experts cannot help, or where the split does not fit the router: then
    "refused" says why. values: as analyze_conflict gives them; least: see `lasting`.
    """
    model = cast(Model, run.model)
    conflicts = lasting(values, least=least)
    splits, remedies = propose(run.config, model, run.catalogue, conflicts)
    found: dict[str, Any] = {"lasting": conflicts, "remedies": remedies, "parameters": None, "refused": None}
    if not splits:
        return found, None
    try:
        config = separate(run.config, model, splits)
        before, after = (parameters(one, run.specs, run.catalogue.tasks) for one in (run.config, config))
    except ConfigError as error:
        return {**found, "refused": str(error)}, None
    return {**found, "parameters": {"before": before, "after": after}}, config


def write_split(loaded: LoadedConfig, config: Config, path: Path) -> None:
    """The configuration, complete and with an output folder of its own.

    Raises ConfigError where it cannot be written.
    """
    train = replace(config.train, output=f"{config.train.output.rstrip('/')}-split")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_config(replace(loaded, config=replace(config, train=train)), path)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {path}: {error.strerror or error}") from error
