"""The published ways of settling conflicts between losses, each from the Gram matrix of their gradients alone.

X Gram matrices, T losses; see registry.Weigh. g_i is the gradient of loss i, G_ij = g_i . g_j; the update is the sum of
w_i g_i.
"""

from __future__ import annotations

import functools
import math

import torch

from moemm.harmonize.interior import quadratic, solve, times
from moemm.harmonize.pivot import minimise
from moemm.harmonize.registry import Context, register_harmonizer

TINY = 1e-12


@register_harmonizer("sum")
def plain_sum(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Every loss counts 1."""
    return gram_XTT.new_ones(gram_XTT.shape[:2])


@register_harmonizer("realign")
def realign(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """From each gradient take its part against each one that it conflicts with, all from the originals.

    Wu et al. 2022 (Scaling Multimodal Pre-Training via Cross-Modality Gradient Harmonization) for two losses; here for
    any number, and without an order.
    """
    against_XTT = gram_XTT / _squares(gram_XTT)[:, None, :]
    return 1.0 - (against_XTT * (conflicts(gram_XTT, context.gamma))).sum(1)


@register_harmonizer("curriculum", drops="curriculum")
def curriculum(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Keep what has no conflict and leave the rest out, all its losses together (Wu et al. 2022)."""
    keep_X = ~conflicts(gram_XTT, context.gamma).flatten(1).any(1)
    return keep_X[:, None].to(gram_XTT.dtype).expand(gram_XTT.shape[:2]).contiguous()


@register_harmonizer("realign_curriculum", drops="curriculum")
def realign_curriculum(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Leave out what conflicts by more than gamma; realign what then still conflicts (Wu et al. 2022)."""
    rest = Context(gamma=0.0, generator=context.generator)
    return curriculum(gram_XTT, context) * realign(gram_XTT, rest)


@register_harmonizer("pcgrad")
def pcgrad(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """From each gradient take, one after the other in random order, its part against the others (arXiv:2001.06782)."""
    share_XTT = _eye(gram_XTT)
    square_XT = _squares(gram_XTT)
    for i, j in _random_pairs(gram_XTT.shape[1], context.generator):
        product_X = (share_XTT[:, i] * gram_XTT[:, j]).sum(1)
        share_XTT[:, i, j] -= product_X.clamp_max(0.0) / square_XT[:, j]
    return share_XTT.sum(1)


@register_harmonizer("gradvac", keeps=("cosine",))
def gradvac(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Turn each gradient until its cosine to the others is at least what it has been on average (arXiv:2010.05874).

    Averages are exponential, of rate `strength`, one for each pair, over the steps and all Gram matrices of a step.
    """
    num = gram_XTT.shape[1]
    wanted_TT = context.state["cosine"]
    share_XTT, length_XT = _eye(gram_XTT), _squares(gram_XTT).sqrt()
    for i, j in _random_pairs(num, context.generator):
        product_XT = times(gram_XTT, share_XTT[:, i])
        own_X = (product_XT * share_XTT[:, i]).sum(1).clamp_min(0.0).sqrt()
        cos_X = (product_XT[:, j] / (own_X * length_XT[:, j]).clamp_min(TINY)).clamp(-1.0, 1.0)
        goal = wanted_TT[i, j].clone()
        turn_X = goal * (1.0 - cos_X**2).sqrt() - cos_X * (1.0 - goal**2).clamp_min(0.0).sqrt()
        turn_X = own_X * turn_X / (length_XT[:, j] * (1.0 - goal**2).clamp_min(TINY).sqrt())
        share_XTT[:, i, j] += torch.where(cos_X < goal, turn_X, 0.0)
        wanted_TT[i, j] = (1.0 - context.strength) * goal + context.strength * cos_X.mean()
    return share_XTT.sum(1)


@register_harmonizer("cagrad")
def cagrad(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """The worst loss gains most, within `strength` times the mean gradient's length of it (arXiv:2110.14048).

    Divided by 1 + strength, so that gradients that agree keep their length.
    """
    num, c = gram_XTT.shape[1], context.strength
    pull_XT = gram_XTT.mean(1)
    radius_X = c * pull_XT.mean(1).clamp_min(0.0).sqrt()
    slope = functools.partial(_cagrad_slope, gram_XTT=gram_XTT, pull_XT=pull_XT, radius_X=radius_X)
    w_XT, solved_X = solve(slope, _centre(gram_XTT), torch.ones_like(pull_XT))
    hard_x = (~solved_X).nonzero().flatten()
    if len(hard_x):
        w_XT[hard_x] = _cagrad_by_length(gram_XTT[hard_x], pull_XT[hard_x], radius_X[hard_x])
    length_X = (times(gram_XTT, w_XT) * w_XT).sum(1).clamp_min(TINY).sqrt()
    return (1.0 + num * (radius_X / length_X)[:, None] * w_XT) / (1.0 + c)


def _cagrad_slope(
    w_XT: torch.Tensor, *, gram_XTT: torch.Tensor, pull_XT: torch.Tensor, radius_X: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and Hessian of g_w . g_0 + r |g_w|, where g_w is the mean of the gradients that w weighs."""
    along_XT = times(gram_XTT, w_XT)
    length_X = ((along_XT * w_XT).sum(1) + TINY).sqrt()
    unit_XT = along_XT / length_X[:, None]
    curve_XTT = (gram_XTT - unit_XT[:, :, None] * unit_XT[:, None, :]) * (radius_X / length_X)[:, None, None]
    return pull_XT + radius_X[:, None] * unit_XT, curve_XTT + TINY * _eye(gram_XTT)


def _cagrad_by_length(gram_XTT: torch.Tensor, pull_XT: torch.Tensor, radius_X: torch.Tensor) -> torch.Tensor:
    """(X, T) w near the kink |g_w| = 0, where Newton's steps lead nowhere.

    Since |g_w| is the least of g_w . g_w / 2 s + s / 2 over s, find by halving the s at which the best w has |g_w| = s.
    """
    low_X, high_X = torch.full_like(radius_X, math.log(TINY)), torch.full_like(radius_X, math.log(len(gram_XTT[0])))
    w_XT = _centre(gram_XTT)
    for _ in range(40):
        middle_X = 0.5 * (low_X + high_X)
        matrix_XTT = (radius_X / middle_X.exp())[:, None, None] * gram_XTT
        size_X = 1.0 + matrix_XTT.abs().flatten(1).amax(1)
        problem = quadratic(matrix_XTT / size_X[:, None, None], pull_XT / size_X[:, None])
        w_XT = solve(problem, _centre(gram_XTT), torch.ones_like(pull_XT))[0]
        longer_X = (times(gram_XTT, w_XT) * w_XT).sum(1).clamp_min(0.0).sqrt() > middle_X.exp()
        low_X, high_X = torch.where(longer_X, middle_X, low_X), torch.where(longer_X, high_X, middle_X)
    return w_XT


@register_harmonizer("mgda")
def mgda(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """T times the shortest mean of the gradients, which opposes none of them (Desideri 2012; arXiv:1810.04650)."""
    num = gram_XTT.shape[1]
    return num * solve(quadratic(gram_XTT), _centre(gram_XTT), gram_XTT.new_ones(gram_XTT.shape[:2]))[0]


@register_harmonizer("imtl_g")
def imtl_g(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Equal projections onto every gradient's direction (Liu et al., ICLR 2021); weights may be negative."""
    length_XT, cosine_XTT = _squares(gram_XTT).sqrt(), correlation(gram_XTT)
    raw_XT = times(torch.linalg.pinv(cosine_XTT, hermitian=True), torch.ones_like(length_XT)) / length_XT
    total_X1 = raw_XT.sum(1, keepdim=True)
    fine_X1 = total_X1.abs() > TINY * raw_XT.abs().amax(1, keepdim=True)
    return torch.where(fine_X1, gram_XTT.shape[1] * raw_XT / total_X1.where(fine_X1, 1.0), 1.0)


@register_harmonizer("nash_mtl")
def nash_mtl(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """The Nash bargain: G w = 1 / w up to scale (arXiv:2202.01017); scaled to a sum of T."""
    length_XT, cosine_XTT = _squares(gram_XTT).sqrt(), correlation(gram_XTT)
    w_XT = _bargain(cosine_XTT + TINY * _eye(gram_XTT)) / length_XT
    return gram_XTT.shape[1] * w_XT / w_XT.sum(1, keepdim=True)


def _bargain(matrix_XTT: torch.Tensor) -> torch.Tensor:
    """Minimise x' M x / 2 - sum of log x by damped Newton steps; the function is self-concordant."""
    x_XT = matrix_XTT.new_ones(matrix_XTT.shape[:2])
    for _ in range(100):
        slope_XT = times(matrix_XTT, x_XT) - 1.0 / x_XT
        factor_XTT = torch.linalg.cholesky_ex(matrix_XTT + torch.diag_embed(x_XT**-2))[0]
        step_XT = torch.cholesky_solve(slope_XT[..., None], factor_XTT)[..., 0]
        decrement_X1 = (slope_XT * step_XT).sum(1, keepdim=True).clamp_min(0.0).sqrt()
        x_XT = x_XT - step_XT / torch.where(decrement_X1 < 0.25, 1.0, 1.0 + decrement_X1)
        if bool((decrement_X1 < 1e-13).all()):
            break
    return x_XT


@register_harmonizer("aligned_mtl")
def aligned_mtl(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Make the gradients' principal components as short as the shortest (Senushkin et al., CVPR 2023)."""
    value_XT, vector_XTT = torch.linalg.eigh(gram_XTT)
    used_XT = value_XT > value_XT[:, -1:] * value_XT.shape[1] * torch.finfo(value_XT.dtype).eps
    least_X1 = value_XT.masked_fill(~used_XT, torch.inf).amin(1, keepdim=True)
    scale_XT = torch.where(used_XT, (least_X1 / value_XT.where(used_XT, 1.0)).sqrt(), 0.0)
    return times(vector_XTT, scale_XT * vector_XTT.sum(1))


@register_harmonizer("upgrad")
def upgrad(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Project each gradient to where it opposes none, and add those up (Jacobian descent, arXiv:2406.16232)."""
    (num, length_XT), cosine_XTT = (gram_XTT.shape[1], _squares(gram_XTT).sqrt()), correlation(gram_XTT)
    if num == 2:
        clash_X1 = -cosine_XTT[:, 0, 1:].clamp_max(0.0)
        return 1.0 + clash_X1 * length_XT.flip(1) / length_XT
    each_XTT = minimise(cosine_XTT.repeat_interleave(num, dim=0), cosine_XTT.flatten(0, 1)).view_as(gram_XTT)
    return 1.0 + (each_XTT * length_XT[:, :, None]).sum(1) / length_XT


@register_harmonizer("dual_cone")
def dual_cone(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Project the sum to where it opposes no gradient (GEM, arXiv:1706.08840)."""
    length_XT = _squares(gram_XTT).sqrt()
    pull_XT = gram_XTT.sum(1) / length_XT
    size_X1 = pull_XT.abs().amax(1, keepdim=True).clamp_min(TINY)
    return 1.0 + size_X1 * minimise(correlation(gram_XTT), pull_XT / size_X1) / length_XT


@register_harmonizer("equal_norm")
def equal_norm(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """Every gradient as long as they are on average, whatever their angles: tells magnitude from conflict."""
    length_XT = _squares(gram_XTT).sqrt()
    return length_XT.mean(1, keepdim=True) / length_XT


@register_harmonizer("random")
def random_weights(gram_XTT: torch.Tensor, context: Context) -> torch.Tensor:
    """T times the softmax of normal draws (arXiv:2111.10603): what weighing without knowing gives.

    One draw for all Gram matrices: a sample's weights must not depend on which rank it lies on.
    """
    draw_1T = torch.randn(1, gram_XTT.shape[1], generator=context.generator, dtype=gram_XTT.dtype)
    return gram_XTT.shape[1] * draw_1T.softmax(1).to(gram_XTT.device).repeat(gram_XTT.shape[0], 1)


def correlation(gram_XTT: torch.Tensor) -> torch.Tensor:
    """(X, T, T) cosines between the gradients."""
    length_XT = _squares(gram_XTT).sqrt()
    return (gram_XTT / (length_XT[:, :, None] * length_XT[:, None, :])).clamp(-1.0, 1.0)


def conflicts(gram_XTT: torch.Tensor, gamma: float) -> torch.Tensor:
    """(X, T, T) bool: pairs of two losses whose cosine is under gamma."""
    apart_TT = ~torch.eye(gram_XTT.shape[1], dtype=torch.bool, device=gram_XTT.device)
    return (correlation(gram_XTT) < gamma) & apart_TT


def _squares(gram_XTT: torch.Tensor) -> torch.Tensor:
    return gram_XTT.diagonal(dim1=1, dim2=2)


def _eye(gram_XTT: torch.Tensor) -> torch.Tensor:
    eye_TT = torch.eye(gram_XTT.shape[1], dtype=gram_XTT.dtype, device=gram_XTT.device)
    return eye_TT.expand_as(gram_XTT).clone()


def _centre(gram_XTT: torch.Tensor) -> torch.Tensor:
    return gram_XTT.new_full(gram_XTT.shape[:2], 1.0 / gram_XTT.shape[1])


def _random_pairs(num: int, generator: torch.Generator | None) -> list[tuple[int, int]]:
    """Each loss with each other one, the others in an order of its own."""
    orders = [torch.randperm(num, generator=generator).tolist() for _ in range(num)]
    return [(i, j) for i, order in enumerate(orders) for j in order if j != i]
