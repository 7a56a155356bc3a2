"""Many small convex problems at once, by a primal-dual interior point method, in float64.

    minimise f(x)  subject to  x >= 0  and, where `total` is given,  total . x = 1

Mehrotra's predictor and corrector (SIAM J. Optim. 2, 1992). X problems, T unknowns each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

RIDGE = 1e-14
"""Added to the diagonal of a problem's matrix: of solutions that are as good it picks the smallest."""
STEPS, GAP, BACK_OFF = 60, 1e-14, 0.995

Evaluate = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""x (X, T) -> gradient (X, T), Hessian (X, T, T) of the objective."""


class Point(NamedTuple):
    """x, the multipliers z of x >= 0, and the multiplier of the sum (zeros without one)."""

    x_XT: torch.Tensor
    z_XT: torch.Tensor
    y_X: torch.Tensor

    def moved(self, by: Point, step_X: torch.Tensor) -> Point:
        """This point and `step` times the other."""
        step_X1 = step_X[:, None]
        return Point(self.x_XT + step_X1 * by.x_XT, self.z_XT + step_X1 * by.z_XT, self.y_X + step_X * by.y_X)


def solve(
    evaluate: Evaluate, start_XT: torch.Tensor, total_XT: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(X, T) minimisers, and (X,) which of them are exact. start: positive, and of the right sum."""
    point = Point(start_XT, torch.ones_like(start_XT), start_XT.new_zeros(start_XT.shape[0]))
    for _ in range(STEPS):
        gradient_XT, hessian_XTT = evaluate(point.x_XT)
        solved_X = _is_solved(point, gradient_XT, total_XT)
        if bool(solved_X.all()):
            break
        system = _System(point, gradient_XT, hessian_XTT, total_XT)
        product_XT = point.x_XT * point.z_XT
        guess = system.direction(-product_XT)
        reach_X1 = _longest(point, guess)[:, None]
        # A guess that cannot be followed far is a bad one: then centre, and trust its second order little. Without that
        # a few problems in a thousand go round in circles.
        centre_X1 = (1.0 - reach_X1) ** 3 * product_XT.mean(1, keepdim=True)
        direction = system.direction(centre_X1 - product_XT - reach_X1**2 * guess.x_XT * guess.z_XT)
        point = point.moved(direction, BACK_OFF * _longest(point, direction))
    return point.x_XT, solved_X


def quadratic(matrix_XTT: torch.Tensor, vector_XT: torch.Tensor | None = None) -> Evaluate:
    """x' M x / 2 + v . x, with RIDGE."""
    hessian_XTT = matrix_XTT + RIDGE * torch.eye(matrix_XTT.shape[-1], dtype=matrix_XTT.dtype, device=matrix_XTT.device)
    shift_XT: torch.Tensor | float = 0.0 if vector_XT is None else vector_XT
    return lambda x_XT: (times(hessian_XTT, x_XT) + shift_XT, hessian_XTT)


def times(matrix_XTT: torch.Tensor, x_XT: torch.Tensor) -> torch.Tensor:
    """(X, T) products of each matrix and its vector."""
    return (matrix_XTT @ x_XT[..., None])[..., 0]


class _System:
    """The linear system of one step, factored once for both directions."""

    def __init__(
        self, point: Point, gradient_XT: torch.Tensor, hessian_XTT: torch.Tensor, total_XT: torch.Tensor | None
    ):
        self.point, self.total_XT = point, total_XT
        self.dual_XT = gradient_XT - point.z_XT
        if total_XT is not None:
            self.dual_XT = self.dual_XT - point.y_X[:, None] * total_XT
            self.primal_X = (total_XT * point.x_XT).sum(1) - 1.0
        self.factor_XTT = torch.linalg.cholesky_ex(hessian_XTT + torch.diag_embed(point.z_XT / point.x_XT))[0]

    def direction(self, product_XT: torch.Tensor) -> Point:
        """Where to go so that x z changes by `product`, to first order."""
        x_XT, z_XT, y_X = self.point
        step_XT = self._inverse(product_XT / x_XT - self.dual_XT)
        step_y_X = torch.zeros_like(y_X)
        if self.total_XT is not None:
            along_XT = self._inverse(self.total_XT)
            step_y_X = -(self.primal_X + (self.total_XT * step_XT).sum(1)) / (self.total_XT * along_XT).sum(1)
            step_XT = step_XT + step_y_X[:, None] * along_XT
        return Point(step_XT, (product_XT - z_XT * step_XT) / x_XT, step_y_X)

    def _inverse(self, right_XT: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(right_XT[..., None], self.factor_XTT)[..., 0]


def _longest(point: Point, direction: Point) -> torch.Tensor:
    """(X,) the largest step of at most 1 that leaves x and z positive."""
    ratios = [-step / value for value, step in zip(point[:2], direction[:2], strict=True)]
    return 1.0 / torch.cat(ratios, dim=1).amax(1).clamp_min(1.0)


def _is_solved(point: Point, gradient_XT: torch.Tensor, total_XT: torch.Tensor | None) -> torch.Tensor:
    """(X,) whether neither the optimality nor the gap leaves anything to gain."""
    rest_XT = gradient_XT - point.z_XT
    if total_XT is not None:
        rest_XT = rest_XT - point.y_X[:, None] * total_XT
    size_X = 1.0 + gradient_XT.abs().amax(1)
    return ((point.x_XT * point.z_XT).amax(1) < GAP * size_X) & (rest_XT.abs().amax(1) < 1e-12 * size_X)
