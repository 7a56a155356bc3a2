"""Supervised losses: cross entropy, binary cross entropy, squared error, as sums over the samples of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional as F

from moemm.data.catalogue import TaskInfo


def supervised_losses(
    outputs: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
    tasks: Sequence[TaskInfo],
    *,
    label_smoothing: float = 0.0,
) -> dict[str, torch.Tensor]:
    """task -> scalar fp32: the sum over its samples, without the task's weight; 0 with a gradient where it has none.

    outputs (n, C) fp32. targets: classification (n,) int64; multilabel (n, C), regression (n,) or (n, C) float32.
    Multilabel and regression losses are means over the C columns, so that a task's weight means the same for any C.
    """
    return {t.name: _loss(t, outputs[t.name], targets[t.name], label_smoothing=label_smoothing) for t in tasks}


def _loss(task: TaskInfo, output_nC: torch.Tensor, target: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
    if task.target == "classification":
        return F.cross_entropy(output_nC, target, reduction="sum", label_smoothing=label_smoothing)
    if task.target == "multilabel":
        loss_nC = F.binary_cross_entropy_with_logits(output_nC, target.float(), reduction="none")
    else:
        loss_nC = F.mse_loss(output_nC, target.float().view_as(output_nC), reduction="none")
    return loss_nC.sum() / output_nC.shape[1]
