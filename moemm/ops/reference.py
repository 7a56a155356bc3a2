"""The ops in plain PyTorch: what tests hold the compiled ones against, and what runs where those are not built.

T tokens, D width, K slots a token, R rows. Indices are checked by index_select: each function shifts them by one, onto
a table whose first row is zeros, so that -1 (none) reads zeros and anything else out of range is an IndexError.
"""

from __future__ import annotations

import torch


def permute(x_TD: torch.Tensor, order_R: torch.Tensor, inverse_TK: torch.Tensor) -> torch.Tensor:
    """Rows of x in the order of a plan: (T, D) -> (R, D); see moemm.ops.permute."""
    num_slots = inverse_TK.shape[1]
    token_R = torch.where(order_R < 0, order_R, order_R.div(num_slots, rounding_mode="floor"))
    return _take(x_TD, token_R)


def combine(y_RD: torch.Tensor, inverse_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """A token's rows, weighted and summed: (R, D) -> (T, D); see moemm.ops.combine."""
    exact = torch.promote_types(y_RD.dtype, torch.float32)
    rows_TKD = _take(y_RD, inverse_TK.flatten()).view(*inverse_TK.shape, y_RD.shape[1])
    gates_TK = gates_TK.masked_fill(inverse_TK < 0, 0.0)
    return (rows_TKD.to(exact) * gates_TK.to(exact).unsqueeze(-1)).sum(dim=1).to(y_RD.dtype)


def _take(table_ND: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """Rows of the table; zeros for -1."""
    padded = torch.cat([table_ND.new_zeros(1, table_ND.shape[1]), table_ND])
    return padded.index_select(0, index_R + 1)
