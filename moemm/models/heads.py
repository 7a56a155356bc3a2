"""From the stream to predictions: pool the tokens of each sample, then one linear head a task.

T tokens, D width, B samples, C outputs of a task.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from moemm.data.catalogue import TaskInfo


class Pool(nn.Module):
    """Attention pooling with one learned query a task and head, joined with the mean: (T, D) -> (B, 2 D)."""

    def __init__(self, dim: int, heads: int, num_tasks: int):
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.query_ND = nn.Parameter(torch.randn(num_tasks, dim) * 0.02)

    def forward(self, x_TD: torch.Tensor, sample_T: torch.Tensor, task_B: torch.Tensor) -> torch.Tensor:
        """Pool the tokens of each sample for the task that it belongs to; a sample without tokens gives zeros."""
        num_samples, dim = task_B.shape[0], x_TD.shape[1]
        query_THd = self.query_ND[task_B][sample_T].view(x_TD.shape[0], self.heads, dim // self.heads)
        key_THd = self.key(x_TD).view_as(query_THd)
        score_TH = (query_THd * key_THd).sum(-1).float() * (dim // self.heads) ** -0.5
        weight_TH = _segment_softmax(score_TH, sample_T, num_samples).to(x_TD.dtype)
        value_THd = self.value(x_TD).view_as(query_THd) * weight_TH[..., None]
        attended_BD = x_TD.new_zeros(num_samples, dim).index_add(0, sample_T, value_THd.flatten(1))
        count_B = torch.bincount(sample_T, minlength=num_samples).clamp_min(1)
        mean_BD = x_TD.new_zeros(num_samples, dim).index_add(0, sample_T, x_TD) / count_B[:, None]
        return torch.cat([attended_BD, mean_BD.to(x_TD.dtype)], dim=1)


class Heads(nn.Module):
    """One linear layer a task, called in a fixed order, with zero rows where the batch has none of the task."""

    def __init__(self, tasks: Iterable[TaskInfo], dim: int, heads: int, *, dropout: float):
        super().__init__()
        self.tasks = tuple(tasks)
        self.pool = Pool(dim, heads, len(self.tasks))
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.ModuleDict({task.name: nn.Linear(2 * dim, task.outputs) for task in self.tasks})
        for layer in self.linear.values():
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x_TD: torch.Tensor, sample_T: torch.Tensor, task_B: torch.Tensor) -> dict[str, torch.Tensor]:
        """task -> (its samples in batch order, C) fp32 outputs: logits, or values of a regression."""
        pooled_BX = self.dropout(self.pool(x_TD, sample_T, task_B))
        rows = {task.name: pooled_BX[task_B == number] for number, task in enumerate(self.tasks)}
        return {name: self.linear[name](x).float() for name, x in rows.items()}


def _segment_softmax(score_TH: torch.Tensor, sample_T: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Softmax over the tokens of each sample."""
    shape = (num_samples, score_TH.shape[1])
    index_TH = sample_T[:, None].expand_as(score_TH)
    top_BH = score_TH.detach().new_full(shape, float("-inf")).scatter_reduce(0, index_TH, score_TH.detach(), "amax")
    weight_TH = torch.exp(score_TH - top_BH[sample_T])
    total_BH = weight_TH.new_zeros(shape).index_add(0, sample_T, weight_TH)
    return weight_TH / total_BH[sample_T]
