"""Many small non-negative problems at once, by exchanging which unknowns are zero (block principal pivoting, float64).

    minimise u' M u / 2 + v . u  subject to  u >= 0

Portugal, Judice and Vicente (Math. Comp. 63, 1994). Some three exchanges where the interior point method takes fifteen
steps, but no guarantee: what does not settle, or not exactly enough, is left to that. X problems, T unknowns each.
"""

from __future__ import annotations

import torch

from moemm.harmonize.interior import quadratic, solve, times

EXCHANGES, EXACT = 8, 1e-11


def minimise(matrix_XTT: torch.Tensor, vector_XT: torch.Tensor) -> torch.Tensor:
    """(X, T) minimisers. matrix: positive semidefinite, diagonal 1."""
    found_XT, free_XT = torch.zeros_like(vector_XT), vector_XT < 0.0
    left_x = torch.arange(vector_XT.shape[0], device=vector_XT.device)
    for _ in range(EXCHANGES):
        matrix_xtt, vector_xt, free_xt = matrix_XTT[left_x], vector_XT[left_x], free_XT[left_x]
        u_xt = _where_free(matrix_xtt, vector_xt, free_xt)
        slope_xt = times(matrix_xtt, u_xt) + vector_xt
        wrong_xt = torch.where(free_xt, u_xt, slope_xt) < -EXACT
        # A slope that is not 0 where the unknown is free: the matrix is singular there, or nearly.
        inexact_x = ~((slope_xt.abs() < EXACT * (1.0 + u_xt.abs().amax(1, keepdim=True))) | ~free_xt).all(1)
        fine_x = ~(wrong_xt.any(1) | inexact_x)
        found_XT[left_x[fine_x]] = u_xt[fine_x].clamp_min(0.0)
        free_XT[left_x] = free_xt ^ wrong_xt
        left_x = left_x[~fine_x]
        if not len(left_x):
            return found_XT
    problem = quadratic(matrix_XTT[left_x], vector_XT[left_x])
    found_XT[left_x] = solve(problem, torch.ones_like(vector_XT[left_x]))[0]
    return found_XT


def _where_free(matrix_XTT: torch.Tensor, vector_XT: torch.Tensor, free_XT: torch.Tensor) -> torch.Tensor:
    """(X, T) solutions of M u = -v among the free unknowns, 0 for the others; not a number for a singular matrix."""
    both_XTT = free_XT[:, :, None] & free_XT[:, None, :]
    eye_TT = torch.eye(matrix_XTT.shape[-1], dtype=matrix_XTT.dtype, device=matrix_XTT.device)
    factor_XTT, failed_X = torch.linalg.cholesky_ex(torch.where(both_XTT, matrix_XTT, eye_TT))
    right_XT1 = torch.where(free_XT, -vector_XT, 0.0)[..., None]
    u_XT = torch.cholesky_solve(right_XT1, factor_XTT)[..., 0]
    return u_XT.masked_fill(failed_X[:, None] > 0, torch.nan)
