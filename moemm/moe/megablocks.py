"""model.experts.backend: megablocks. The experts' products by MegaBlocks' grouped GEMM (arXiv:2211.15841).

The only importer of megablocks, and only when it is asked for. R rows, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from moemm import ops
from moemm.errors import ConfigError, KernelError
from moemm.ops.grouped_mlp import Activation
from moemm.ops.reference import ACTIVATIONS

INSTALL = (
    "pip install --no-build-isolation --no-deps megablocks stanford-stk grouped_gemm, on a machine with a GPU and nvcc "
    "(without --no-deps pip replaces torch); moemm doctor says whether its ops were built"
)
OTHERS = "or set model.experts.backend to auto or torch"


def grouped_gemm() -> Any:
    """megablocks' grouped GEMM, `gmm(rows, weights, rows_per_expert, trans_b)`.

    Raises KernelError, with how to install it, where megablocks or its ops are missing.
    """
    try:
        from megablocks import grouped_gemm_util
    except ImportError as error:
        raise KernelError(
            f"model.experts.backend is megablocks, but it cannot be imported: {error}. {INSTALL}; {OTHERS}."
        ) from None
    if grouped_gemm_util.ops is None:
        raise KernelError(
            f"model.experts.backend is megablocks, but megablocks finds no grouped_gemm. {INSTALL}; {OTHERS}."
        )
    return grouped_gemm_util.ops.gmm


def check(*, widths: Sequence[int]) -> None:
    """Can megablocks run experts of these widths here?

    Raises ConfigError for experts of unequal width, KernelError without CUDA, megablocks or its ops.
    """
    if len(set(widths)) > 1:
        raise ConfigError(
            f"model.experts.backend is megablocks, which multiplies experts of one width, but these are "
            f"{', '.join(map(str, sorted(set(widths))))} wide. Make modality_width and routed_width equal, {OTHERS}."
        )
    grouped_gemm()
    if not torch.cuda.is_available():
        raise KernelError(
            f"model.experts.backend is megablocks, which needs a CUDA device, and there is none. Run on one, {OTHERS}."
        )


def run_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    w1: Sequence[torch.Tensor],
    w2: Sequence[torch.Tensor],
    *,
    residual_TD: torch.Tensor | None = None,
    activation: Activation,
) -> torch.Tensor:
    """moemm's plan, permute and combine around megablocks' products: (T, D) -> (T, D).

    The rows of each expert go to the host, which waits for them: megablocks wants them there.

    Raises KernelError for tensors that are not bfloat16 on CUDA.
    """
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16:
        kind = f"{str(x_TD.dtype).removeprefix('torch.')} on {x_TD.device}"
        raise KernelError(
            f"megablocks multiplies bfloat16 on CUDA, but the tokens are {kind}: set train.precision to bf16, {OTHERS}."
        )
    plan = ops.plan(experts_TK, num_experts=len(w1))
    rows_E = plan.counts_E.cpu()
    used = int(rows_E.sum())
    x_RD = ops.permute(x_TD, plan.order_R, plan.inverse_TK)[:used]
    multiply = grouped_gemm()
    hidden_RF = ACTIVATIONS[activation](multiply(x_RD, torch.stack(list(w1)), rows_E, True))
    y_RD = multiply(hidden_RF.contiguous(), torch.stack(list(w2)), rows_E, True)
    y_RD = F.pad(y_RD, (0, 0, 0, len(plan.order_R) - used))
    return ops.combine(y_RD, plan.inverse_TK, gates_TK, residual_TD)
