"""What settles conflicts in a run: at the fork or the trunk, for which losses, and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moemm.config.check_objectives import is_on, label_free
from moemm.config.schema import Config, HarmonizeConfig
from moemm.distributed import sum_over_ranks
from moemm.errors import ConfigError
from moemm.harmonize import SCALES, Conflict, Fork, GradNorm, LossScale, Settler
from moemm.models import Model
from moemm.moe import MoELayer

DRAWS = 1 << 20
"""Micro-batches of a step are told apart by less than this."""


@dataclass(frozen=True, slots=True)
class ConflictReport:
    """Of a window and all ranks. pairs: "a | b" -> (mean cosine of the gradients, share of groups where it is below 0).

    broken, refused: groups with a gradient that is not finite, and groups whose weights were not, so that the plain sum
    stood in. dropped: share of the samples with two pairs of modalities that were left out; None: none was judged.
    """

    pairs: dict[str, tuple[float, float]]
    broken: int
    refused: int
    dropped: float | None = None


def build_fork(config: Config, model: Model) -> Fork | None:
    """The fork that `harmonize` asks for; None at the trunk, and for `method: sum` unless the scale looks at gradients.

    Raises ConfigError for an unknown method, where no two losses read one token, and for `per: expert` where the last
    block sends all tokens to the same experts.
    """
    wanted = config.harmonize
    if wanted.at == "trunk" or (wanted.method == "sum" and wanted.scale != "gradnorm"):
        return None
    losses = [task.name for task in model.tasks] + list(model.pretext.losses if model.pretext else ())
    meet = model.heads.num_passes > 1 or bool(model.pretext and model.pretext.meet)
    if wanted.method != "sum" and not meet:
        raise ConfigError(
            f"harmonize.method is {wanted.method}, but no two losses of this run read the same tokens, so that their "
            f"gradients never meet\n  given: {', '.join(losses)}\n"
            "  allowed: several labels of one sample (data.joint_labels), two pairs of modalities under\n"
            "    objectives.contrastive, or objectives.similarity beside supervised tasks or masked modelling\n"
            "  to do: set one of these up, or leave `harmonize` out"
        )
    last = model.trunk.blocks[-1].ffn
    if wanted.per == "expert" and not (isinstance(last, MoELayer) and last.tells_apart):
        raise ConfigError(
            "harmonize.per is expert, but the last block has no modality or routed expert: all its tokens would be one "
            "group\n  allowed: sample, token, modality, batch\n"
            "  to do: say `per: batch`, or give the last block such experts (`layers` of model.experts.groups)"
        )
    return Fork(wanted.method, losses, per=wanted.per or "sample", reduce=sum_over_ranks, strength=wanted.strength)


def build_settler(config: Config, model: Model) -> Settler | None:
    """What weighs the losses at the trunk, in the order of MicroLoss.parts_L; None where `harmonize` does not ask.

    Raises ConfigError for an unknown method, and where there is one loss alone.
    """
    wanted = config.harmonize
    if wanted.method == "sum" or wanted.at == "fork":
        return None
    losses = _losses(config, model)
    if len(losses) < 2:
        raise ConfigError(
            f"harmonize.method is {wanted.method} at the trunk, but this run has one loss alone\n"
            f"  given: {', '.join(losses)}\n"
            "  allowed: two and more tasks or objectives without labels (the pairs of objectives.contrastive are one)\n"
            "  to do: add one, or leave `harmonize` out; `at: fork` compares the pairs of objectives.contrastive"
        )
    return Settler(wanted.method, losses, strength=wanted.strength)


def _losses(config: Config, model: Model) -> list[str]:
    """Tasks that are learned from, then objectives without labels."""
    tasks = [task.name for task in model.tasks] if is_on(config.objectives.supervised) else []
    return [*tasks, *label_free(config.objectives)]


def build_scale(config: Config, model: Model) -> LossScale | None:
    """The weights that `harmonize.scale` asks for, connected to the model's fork; None for `none`.

    Raises ConfigError for a run of a single loss, and where a task has the name of an objective.
    """
    wanted = config.harmonize
    if wanted.scale == "none":
        return None
    losses = _losses(config, model)
    if len(losses) < 2:
        raise ConfigError(
            f"harmonize.scale is {wanted.scale}, but this run has one loss, whose weight is 1\n"
            f"  given: {losses[0]}\n  allowed: two and more tasks or objectives\n  to do: leave `harmonize.scale` out"
        )
    for name in sorted({name for name in losses if losses.count(name) > 1}):
        raise ConfigError(
            f"harmonize.scale: the task {name} and objectives.{name} have one name, and each a weight\n"
            "  to do: give the task another name"
        )
    scale = SCALES[wanted.scale](losses, wanted, reduce=sum_over_ranks)
    if isinstance(scale, GradNorm):
        assert model.fork is not None
        number_F = torch.tensor([_number(name, losses) for name in model.fork.losses])
        model.fork.watch = partial(scale.watch, number_F=number_F)
    return scale


def _number(name: str, losses: list[str]) -> int:
    """Which loss one of the fork is (each pair of modalities is a loss of its own there), or -1."""
    for known in (name, name.partition(" ")[0]):
        if known in losses:
            return losses.index(known)
    return -1


def gamma(step: int, *, total: int, config: HarmonizeConfig) -> float:
    """The cosine under which losses conflict, at a 0-based step of `total`."""
    if config.gamma_start is None:
        return config.gamma
    progress = min(1.0, step / max(1.0, (config.gamma_over or 1.0) * (total - 1)))
    return config.gamma_start + (config.gamma - config.gamma_start) * progress


def draw_number(seed: int, step: int, micro: int) -> int:
    """What a micro-batch's draws follow from, the same on all ranks."""
    return (seed * DRAWS + step) * DRAWS + micro & (1 << 63) - 1


def report(fork: Settler, world_size: int) -> ConflictReport | None:
    """What was seen at the fork or trunk since the last call, over all ranks (all call it together); None if nothing.
    """  # fmt: skip
    seen = fork.take() or Conflict.none(len(fork.losses), torch.device("cpu"))
    sums = sum_over_ranks(torch.cat([part.flatten().cpu() for part in (seen.cos_LL, seen.pairs_LL, seen.against_LL)]))
    broken, refused = (int(value) // (world_size if fork.shared else 1) for value in sum_over_ranks(seen.counts.cpu()))
    cos_LL, pairs_LL, against_LL = sums.view(3, len(fork.losses), -1).tolist()
    pairs = {
        f"{a} | {b}": (cos_LL[i][j] / pairs_LL[i][j], against_LL[i][j] / pairs_LL[i][j])
        for i, a in enumerate(fork.losses)
        for j, b in enumerate(fork.losses)
        if i < j and pairs_LL[i][j]
    }
    judged, dropped = sum_over_ranks(fork.take_judged().cpu()).tolist() if isinstance(fork, Fork) else (0.0, 0.0)
    return ConflictReport(pairs, broken, refused, dropped / judged if judged else None) if pairs or broken else None
