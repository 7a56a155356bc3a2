"""The fork of a run: which losses it is for, when gamma moves, and what is told of their conflicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moemm.config.schema import Config, HarmonizeConfig
from moemm.distributed import sum_over_ranks
from moemm.errors import ConfigError
from moemm.harmonize import Conflict, Fork
from moemm.models import Model

DRAWS = 1 << 20
"""Micro-batches of a step are told apart by less than this."""


@dataclass(frozen=True, slots=True)
class ConflictReport:
    """Of a window and all ranks. pairs: "a | b" -> (mean cosine of the gradients, share of groups where it is below 0).

    broken, refused: groups with a gradient that is not finite, and groups whose weights were not, so that the plain sum
    stood in.
    """

    pairs: dict[str, tuple[float, float]]
    broken: int
    refused: int


def build_fork(config: Config, model: Model) -> Fork | None:
    """The fork that `harmonize` asks for; None for `method: sum`.

    Raises ConfigError for an unknown method, and where no two losses read one token.
    """
    wanted = config.harmonize
    if wanted.method == "sum":
        return None
    losses = [task.name for task in model.tasks] + list(model.pretext.losses if model.pretext else ())
    if model.heads.num_passes == 1 and not (model.pretext and model.pretext.meet):
        raise ConfigError(
            f"harmonize.method is {wanted.method}, but no two losses of this run read the same tokens, so that their "
            f"gradients never meet\n  given: {', '.join(losses)}\n"
            "  allowed: several labels of one sample (data.joint_labels), two pairs of modalities under\n"
            "    objectives.contrastive, or objectives.similarity beside supervised tasks or masked modelling\n"
            "  to do: set one of these up, or leave `harmonize` out"
        )
    return Fork(wanted.method, losses, per=wanted.per, reduce=sum_over_ranks, strength=wanted.strength)


def gamma(step: int, *, total: int, config: HarmonizeConfig) -> float:
    """The cosine under which losses conflict, at a 0-based step of `total`."""
    if config.gamma_start is None:
        return config.gamma
    progress = min(1.0, step / max(1.0, (config.gamma_over or 1.0) * (total - 1)))
    return config.gamma_start + (config.gamma - config.gamma_start) * progress


def draw_number(seed: int, step: int, micro: int) -> int:
    """What a micro-batch's draws follow from, the same on all ranks."""
    return (seed * DRAWS + step) * DRAWS + micro & (1 << 63) - 1


def report(fork: Fork, world_size: int) -> ConflictReport | None:
    """What the fork saw since the last call, over all ranks (all call it together); None if nothing."""
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
    return ConflictReport(pairs, broken, refused) if pairs or broken else None
