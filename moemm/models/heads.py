"""From the stream to predictions: pool the tokens of each sample, then one linear head a task.

T tokens, D width, B samples, C outputs of a task; P passes, N tasks, t and b: tokens and samples of one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from moemm.data.catalogue import TaskInfo, task_groups


class Pool(nn.Module):
    """Attention pooling with one learned query a task and head, joined with the mean: (T, D) -> (B, 2 D)."""

    def __init__(self, dim: int, heads: int, tasks: Sequence[str]):
        super().__init__()
        self.heads = heads
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        drawn_ND = torch.randn(len(tasks), dim) * 0.02
        # By name, so that a task adds a tensor and reshapes none; (1, D), because they are matrices to the optimizer.
        self.query = nn.ParameterDict({name: drawn_ND[number, None].clone() for number, name in enumerate(tasks)})
        self.tasks = tuple(tasks)

    def forward(self, x_TD: torch.Tensor, sample_T: torch.Tensor, task_B: torch.Tensor) -> torch.Tensor:
        """Pool the tokens of each sample for the task that it belongs to; a sample without tokens gives zeros."""
        num_samples, dim = task_B.shape[0], x_TD.shape[1]
        query_ND = torch.cat([self.query[name] for name in self.tasks])
        query_THd = query_ND[task_B][sample_T].view(x_TD.shape[0], self.heads, dim // self.heads)
        key_THd = self.key(x_TD).view_as(query_THd)
        score_TH = (query_THd * key_THd).sum(-1).float() * (dim // self.heads) ** -0.5
        weight_TH = _segment_softmax(score_TH, sample_T, num_samples).to(x_TD.dtype)
        value_THd = self.value(x_TD).view_as(query_THd) * weight_TH[..., None]
        attended_BD = x_TD.new_zeros(num_samples, dim).index_add(0, sample_T, value_THd.flatten(1))
        count_B = torch.bincount(sample_T, minlength=num_samples).clamp_min(1)
        mean_BD = x_TD.new_zeros(num_samples, dim).index_add(0, sample_T, x_TD) / count_B[:, None]
        return torch.cat([attended_BD, mean_BD.to(x_TD.dtype)], dim=1)


class Heads(nn.Module):
    """One linear layer a task, called in a fixed order, with zero rows where the batch has none of the task.

    Tasks that share their samples (`data.joint_labels`) are served by one pass of the pooling each, in their order; all
    other tasks by the first. There are as many passes as the largest group has tasks, whatever the batch holds.
    """

    task_PN: torch.Tensor

    def __init__(self, tasks: Iterable[TaskInfo], dim: int, heads: int, *, dropout: float):
        super().__init__()
        self.tasks = tuple(tasks)
        groups = task_groups(self.tasks)
        self.num_passes = max(map(len, groups), default=1)
        place_of = {number: place for group in groups for place, number in enumerate(group)}
        self._pass_N = [place_of[number] for number in range(len(self.tasks))]
        self.register_buffer("task_PN", _tasks_of_passes(groups, self.num_passes), persistent=False)
        self.pool = Pool(dim, heads, [task.name for task in self.tasks])
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.ModuleDict({task.name: nn.Linear(2 * dim, task.outputs) for task in self.tasks})
        for layer in self.linear.values():
            nn.init.normal_(layer.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(
        self, x_TD: torch.Tensor | Sequence[torch.Tensor], sample_T: torch.Tensor, task_B: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """task -> (its samples in batch order, C) fp32 outputs: logits, or values of a regression.

        x_TD: the stream, or one for each pass. task_B: which each sample was drawn for; see data.sample.rows_of.
        """
        streams = [x_TD] * self.num_passes if isinstance(x_TD, torch.Tensor) else x_TD
        assert len(streams) == self.num_passes, f"{len(streams)} streams for {self.num_passes} passes"
        passes = [self._pool(number, stream_TD, sample_T, task_B) for number, stream_TD in enumerate(streams)]
        rows = {}
        for number, (task, place) in enumerate(zip(self.tasks, self._pass_N, strict=True)):
            pooled_bX, task_b = passes[place]
            rows[task.name] = pooled_bX[task_b == number]
        return {name: self.linear[name](x).float() for name, x in rows.items()}

    def losses(self, sample_T: torch.Tensor, task_B: torch.Tensor) -> torch.Tensor:
        """(P, T) the task whose loss each pass brings to each token; -1 where the pass does not read it."""
        return self.task_PN[:, task_B][:, sample_T]

    def num_pools(self, task_B: torch.Tensor) -> torch.Tensor:
        """(B,) how many passes pool the tokens of samples that were drawn for these tasks."""
        return 1 + (self.task_PN[1:, task_B] >= 0).sum(0)

    def _pool(
        self, number: int, x_TD: torch.Tensor, sample_T: torch.Tensor, task_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, 2 D) what a pass pools and (b,) for which task: the first all samples, others those with such a task."""
        if number == 0:
            return self.dropout(self.pool(x_TD, sample_T, task_B)), task_B
        own_B = self.task_PN[number][task_B]
        has_B = own_B >= 0
        token_t = has_B[sample_T].nonzero().squeeze(1)
        sample_t = (has_B.cumsum(0) - 1)[sample_T[token_t]]
        own_b = own_B[has_B]
        return self.dropout(self.pool(x_TD.index_select(0, token_t), sample_t, own_b)), own_b


def _tasks_of_passes(groups: Sequence[Sequence[int]], num_passes: int) -> torch.Tensor:
    """(P, N) the task that a pass serves in the samples drawn for a task, -1 for none."""
    task_PN = torch.full((num_passes, sum(map(len, groups))), -1)
    for group in groups:
        for place, number in enumerate(group):
            task_PN[place, group[0]] = task_PN[place, number] = number
    return task_PN


def _segment_softmax(score_TH: torch.Tensor, sample_T: torch.Tensor, num_samples: int) -> torch.Tensor:
    """Softmax over the tokens of each sample."""
    shape = (num_samples, score_TH.shape[1])
    index_TH = sample_T[:, None].expand_as(score_TH)
    top_BH = score_TH.detach().new_full(shape, float("-inf")).scatter_reduce(0, index_TH, score_TH.detach(), "amax")
    weight_TH = torch.exp(score_TH - top_BH[sample_T])
    total_BH = weight_TH.new_zeros(shape).index_add(0, sample_T, weight_TH)
    return weight_TH / total_BH[sample_T]
