"""Heterogeneity of modalities after HighMMT (arXiv:2203.01311): pointwise V-information that transfers, in bits.

PVI(s -> t) = H_null(t) - H(s -> t), on split val. H(s -> t): a trunk trained on s alone, frozen; t's own tokenizer and
heads are fitted through it. H_null(t): the best head on features that are all zero, so the classes' frequencies.
Trunks start from the same weights, and tokenizers and heads of t too, whatever the source: the source's training is
all that differs. The diagonal is fitted in the same way.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moemm.analyze.bits import bits, null_outputs
from moemm.analyze.matrix import Transfer
from moemm.analyze.units import Unit, make_unit
from moemm.config import Config
from moemm.config.schema import ExpertGroupConfig, ExpertsConfig, ModelConfig
from moemm.data.catalogue import Catalogue
from moemm.modalities import ModalitySpec
from moemm.models import Model, build_model
from moemm.models.trunk import Trunk, active_width
from moemm.moe import ExpertMap
from moemm.objectives import supervised_losses

Weights = dict[str, torch.Tensor]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """samples: of each task and split. Passes over those of train: for a source's trunk, and for each transfer."""

    samples: int = 256
    source_passes: int = 10
    transfer_passes: int = 4


def pairs_of(catalogue: Catalogue) -> list[tuple[str, str]]:
    """Pairs of modalities that some task has together, in the catalogue's order."""
    order = [info.name for info in catalogue.modalities]
    sets = [sorted(task.modalities, key=order.index) for task in catalogue.tasks]
    found = {pair for names in sets for pair in itertools.combinations(names, 2)}
    return sorted(found, key=lambda pair: (order.index(pair[0]), order.index(pair[1])))


def transfer_between(
    config: Config,
    catalogue: Catalogue,
    specs: Mapping[str, ModalitySpec],
    units: Sequence[Sequence[str]],
    *,
    effort: Effort | None = None,
    tell: Tell = lambda line: None,
) -> Transfer:
    """PVI in bits from each unit (a tuple of one modality, or of several) to each; a function of config and data alone.

    The network is the configuration's with `model.moe: dense`: one trunk that all of it moves with. tell: gets a line
    about each source. The random state is as before. Raises DataError for a unit without samples.
    """
    effort = effort or Effort()
    seed = config.train.seed
    made = [make_unit(catalogue, specs, names, samples=effort.samples, seed=seed) for names in units]
    plain = _dense(config.model, catalogue)
    bits_ST = np.zeros((len(made), len(made)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start: Weights = Trunk(
            plain, ExpertMap.from_config(plain.experts.groups, ["any"], [], plain.layers)
        ).state_dict()
        for row, source in enumerate(made):
            model = _model(plain, source, start, seed)
            _fit(model, source, model.parameters(), passes=effort.source_passes, config=config)
            trunk: Weights = model.trunk.state_dict()
            bits_ST[row] = [_transfer(plain, trunk, target, config, effort) for target in made]
            tell(f"{row + 1} of {len(made)}: from {source.name}")
    return Transfer("pvi", tuple(unit.name for unit in made), bits_ST)


def _dense(config: ModelConfig, catalogue: Catalogue) -> ModelConfig:
    """The model without its experts, as wide as what a token passes through in it, and without what else a modality has
    of its own: all of a trunk moves from modality to modality.
    """
    names, tasks = [info.name for info in catalogue.modalities], [task.name for task in catalogue.tasks]
    width = active_width(config, ExpertMap.from_config(config.experts.groups, names, tasks, config.layers))
    return ModelConfig(
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        moe="dense",
        experts=ExpertsConfig(groups=[ExpertGroupConfig(kind="shared", width=width)]),
        activation=config.activation,
        dropout=config.dropout,
        attention=config.attention,
    )


def _model(plain: ModelConfig, unit: Unit, trunk: Weights, seed: int) -> Model:
    torch.manual_seed(seed)
    model = build_model(plain, specs=unit.specs, tasks=unit.catalogue.tasks)
    model.trunk.load_state_dict(trunk)
    return model


def _transfer(plain: ModelConfig, trunk: Weights, target: Unit, config: Config, effort: Effort) -> float:
    """PVI of the target through a frozen trunk, the mean over its tasks."""
    model = _model(plain, target, trunk, config.train.seed)
    model.trunk.requires_grad_(False)
    fitted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _fit(model, target, fitted, passes=effort.transfer_passes, config=config)
    return float(np.mean(list(_information(model, target).values())))


def _fit(model: Model, unit: Unit, parameters: Iterable[nn.Parameter], *, passes: int, config: Config) -> None:
    """AdamW with the run's learning rate and weight decay, a tenth of warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=config.train.weight_decay)
    random = np.random.default_rng(config.train.seed)
    order = [batch for _ in range(passes) for batch in random.permutation(len(unit.train)).tolist()]
    warmup = max(1, len(order) // 10)
    model.train()
    for step, number in enumerate(order):
        share = min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / len(order))) / 2
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr * share
        batch = unit.train[number]
        losses = supervised_losses(model(batch).outputs, batch.targets, model.tasks)
        optimizer.zero_grad()
        (sum(losses.values(), torch.zeros(())) / batch.num_samples).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.clip or math.inf)
        optimizer.step()


@torch.no_grad()
def _information(model: Model, unit: Unit) -> dict[str, float]:
    """task -> bits that the model knows about the labels of split val, beyond their frequencies in train."""
    model.eval()
    outputs = [model(batch).outputs for batch in unit.val]
    found = {}
    for task in unit.catalogue.tasks:
        target = unit.targets(task, "val")
        constant_C = null_outputs(task, unit.targets(task, "train"))
        null = bits(task, constant_C.expand(target.shape[0], -1), target)
        found[task.name] = null - bits(task, torch.cat([output[task.name] for output in outputs]), target)
    return found
