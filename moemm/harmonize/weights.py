"""From Gram matrices as they come, with absent losses and broken ones, to a weight for each loss.

T losses; leading dimensions are samples, groups, or none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from moemm.harmonize.registry import Context, Harmonizer, find


class Weights(NamedTuple):
    """w: shape of the Gram matrices without its last axis, float64. counts are numbers of Gram matrices.

    broken: those with a loss whose gradient is not finite; its weight is 0. refused: those for which the method gave
    weights that are not finite; the plain sum stands in.
    """

    w: torch.Tensor
    broken: int
    refused: int


def weights(gram: torch.Tensor, method: str, context: Context | None = None) -> Weights:
    """Weight each of T losses by the Gram matrices (..., T, T) of their gradients, in float64.

    A loss without gradient (a zero row) is left out, and so has no say and weight 1; one whose row is not finite is
    left out and has weight 0. Of a single loss the weight is 1. The weights do not change when a Gram matrix is scaled.
    Raises ConfigError for a method that is not registered.
    """
    harmonizer, context = find(method), context or Context()
    gram_XTT = gram.detach().double().reshape(-1, *gram.shape[-2:])
    finite_XT = torch.isfinite(gram_XTT.diagonal(dim1=1, dim2=2))
    both_XTT = finite_XT[:, :, None] & finite_XT[:, None, :]
    gram_XTT = gram_XTT.where(both_XTT, 0.0)
    w_XT = finite_XT.double()
    refused, drawn = 0, context.generator.get_state() if context.generator is not None else None
    for rows_x, losses_t in _by_presence(gram_XTT.diagonal(dim1=1, dim2=2) > 0.0):
        part_xtt = gram_XTT[rows_x][:, losses_t][:, :, losses_t]
        part_xtt = part_xtt / part_xtt.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        if context.generator is not None and drawn is not None:
            context.generator.set_state(drawn)  # what is drawn must not depend on which other sets this rank has
        found_xt = _call(harmonizer, part_xtt, context, losses_t, gram.shape[-1])
        fine_x1 = torch.isfinite(found_xt).all(1, keepdim=True)
        refused += int((~fine_x1).sum())
        w_XT[rows_x[:, None], losses_t] = found_xt.double().where(fine_x1, 1.0)
    return Weights(w_XT.view(gram.shape[:-1]), int((~finite_XT.all(1)).sum()), refused)


def _call(
    harmonizer: Harmonizer, gram_xtt: torch.Tensor, context: Context, losses_t: torch.Tensor, num_losses: int
) -> torch.Tensor:
    """The method's weights for some of the losses; it sees their part of its state."""
    square_tt = (losses_t[:, None], losses_t)
    for name in harmonizer.keeps:
        context.state.setdefault(name, gram_xtt.new_zeros(num_losses, num_losses))
    part = {name: context.state[name][square_tt] for name in harmonizer.keeps}
    found_xt = harmonizer.weigh(gram_xtt, replace(context, state=part))
    for name, tensor in part.items():
        context.state[name][square_tt] = tensor
    return found_xt


def _by_presence(present_XT: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(rows, losses) for each set of two and more losses that are present together, always in the same order."""
    if bool(present_XT.all()) and present_XT.shape[1] > 1:
        rows_X, losses_T = (torch.arange(size, device=present_XT.device) for size in present_XT.shape)
        return [(rows_X, losses_T)]
    sets_ST, which_X = torch.unique(present_XT, dim=0, return_inverse=True)
    groups = []
    for number, set_T in enumerate(sets_ST):
        losses_t = set_T.nonzero().flatten()
        if len(losses_t) > 1:
            groups.append(((which_X == number).nonzero().flatten(), losses_t))
    return groups
