"""What stands in the stream for a modality that a sample lacks: nothing, or one token made from those that are there.

Only modalities that the sample's task knows are stood in for: a task without sound does not lack sound. Every part is
kept under the names of its modalities, so that another modality adds tensors and reshapes none.
B samples, M modalities, A absent pairs (sample, modality), n samples that have one modality, D width, H hidden units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from moemm.config.schema import ModelConfig
from moemm.data.catalogue import TaskInfo, task_groups
from moemm.data.sample import PackedBatch
from moemm.modalities.base import Tokens
from moemm.models.stream import Absent


class Missing(nn.Module, ABC):
    """Makes one token for each absent modality of a sample."""

    known_TM: torch.Tensor

    def __init__(self, names: Sequence[str], tasks: Sequence[TaskInfo]):
        super().__init__()
        self.names = tuple(names)
        known_TM = torch.tensor([[name in task.modalities for name in names] for task in tasks])
        self.register_buffer("known_TM", known_TM, persistent=False)
        self._known = known_TM.tolist()  # on the host: counting absent modalities then waits for no device
        self._tasks, self._groups = [task.name for task in tasks], task_groups(tasks)

    @abstractmethod
    def forward(
        self, absent: Absent, parts: Sequence[Tokens], batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(A, D) values of the absent pairs, and a loss summed over samples if one is to be learned from.

        parts: the tokens of each modality. Reaches every parameter in the same order in every batch, also where nothing
        is absent. A tuple of tensors: DeepSpeed's ZeRO-3 hooks look into nothing else.
        """

    def absent(self, batch: PackedBatch) -> Absent:
        """Which modalities of their task the samples of a batch lack."""
        sizes = [len(batch.targets[name]) for name in self._tasks]
        for first, *others in self._groups:
            for number in others:
                sizes[number] -= sizes[first]  # those were drawn for the first of the group
        if sum(sizes) != batch.num_samples:  # samples without a target: ask the device
            sizes = torch.bincount(batch.task, minlength=len(self._tasks)).tolist()
        known_M = [sum(size for size, row in zip(sizes, self._known, strict=True) if row[m]) for m in self._columns]
        counts_M = [known - len(packed) for known, packed in zip(known_M, batch.modalities.values(), strict=True)]
        assert min(counts_M) >= 0, "a sample has a modality that its task does not know"
        absent_MB = (self.known_TM[batch.task] & ~batch.presence).T
        pairs = torch.nonzero_static(absent_MB, size=sum(counts_M))
        return Absent(pairs[:, 0], pairs[:, 1], tuple(counts_M))

    @property
    def _columns(self) -> range:
        return range(len(self.names))


class Bank(Missing):
    """The value of absent m is the sum over observed o of W[o, m]: a row for each ordered pair that shares a task.

    Flex-MoE (arXiv:2410.08245) learns a row for each set of observed modalities and each absent one: 2^M of them.
    """

    def __init__(self, names: Sequence[str], tasks: Sequence[TaskInfo], dim: int):
        super().__init__(names, tasks)
        shared_MM = self.known_TM.T.int() @ self.known_TM.int() > 0
        self._observed = [[o for o in self._columns if o != m and shared_MM[o, m]] for m in self._columns]
        self.rows = nn.ModuleDict(
            {
                name: nn.ParameterDict({self.names[o]: torch.randn(dim) * 0.02 for o in observed})
                for name, observed in zip(names, self._observed, strict=True)
            }
        )
        self.dim = dim

    def forward(self, absent: Absent, parts: Sequence[Tokens], batch: PackedBatch) -> tuple[torch.Tensor, None]:
        """(A, D) sums; nothing to be learned from but the tasks."""
        values = [parts[0].values_TD.new_zeros(0, self.dim)]
        for name, observed, sample_n in zip(self.names, self._observed, absent.samples(), strict=True):
            if observed:  # a modality that is alone in its tasks is never absent
                rows_OD = torch.stack([self.rows[name][self.names[o]] for o in observed])  # type: ignore[index]
                values.append(batch.presence[sample_n][:, observed].to(rows_OD.dtype) @ rows_OD)
        return torch.cat(values), None


class Predictor(Missing):
    """The value of absent m is what a network regresses from the observed modalities: decode_m(mean encode_o(state_o)).

    A modality's state is the mean of its tokens. Where m is there and another one too, the squared error of its
    prediction from the others is learned from; the state that is predicted gets no gradient. Two networks a modality,
    so parameters grow with M, and any set of observed modalities is an input.
    """

    def __init__(self, names: Sequence[str], tasks: Sequence[TaskInfo], dim: int, width: int):
        super().__init__(names, tasks)
        self.encode = nn.ModuleDict({name: nn.Sequential(nn.Linear(dim, width), nn.GELU()) for name in names})
        self.decode = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim)) for name in names}
        )
        self.mark_D = nn.Parameter(torch.randn(dim) * 0.02)  # says that a token was predicted, and not observed

    def forward(
        self, absent: Absent, parts: Sequence[Tokens], batch: PackedBatch
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(A, D) predictions, marked as such; while training, the squared error of those that can be checked."""
        states = [_means(tokens, len(packed)) for tokens, packed in zip(parts, batch.modalities.values(), strict=True)]
        codes = [self.encode[name](state_nD) for name, state_nD in zip(self.names, states, strict=True)]
        owners = [packed.sample for packed in batch.modalities.values()]
        sum_BH = codes[0].new_zeros(batch.num_samples, codes[0].shape[1])
        sum_BH = sum_BH.index_add(0, torch.cat(owners), torch.cat(codes))
        count_B = batch.presence.sum(1)
        values, loss = [], torch.zeros((), device=count_B.device)
        for m, lacking_a in enumerate(absent.samples()):
            owner_n, others_n = owners[m], count_B[owners[m]] - 1
            others_nH = (sum_BH[owner_n] - codes[m]) / others_n.clamp_min(1)[:, None]
            observed_aH = sum_BH[lacking_a] / count_B[lacking_a][:, None]
            out_D = self.decode[self.names[m]](torch.cat([others_nH, observed_aH]).to(codes[m].dtype))
            values.append(out_D[owner_n.shape[0] :])
            error_n = (out_D[: owner_n.shape[0]].float() - states[m].detach().float()).square().mean(1)
            # A sample's share is the mean over its modalities; one that has no other to predict from counts nothing.
            loss = loss + (error_n * (others_n > 0) / (others_n + 1)).sum()
        return torch.cat(values) + self.mark_D, loss if self.training else None


def build_missing(config: ModelConfig, names: Sequence[str], tasks: Sequence[TaskInfo]) -> Missing | None:
    """What `model.missing` asks for; None where nothing stands in for absent modalities."""
    missing = config.missing
    if missing.kind == "none":
        return None
    if missing.kind == "bank":
        return Bank(names, tasks, config.dim)
    return Predictor(names, tasks, config.dim, missing.width or config.dim)


def _means(tokens: Tokens, rows: int) -> torch.Tensor:
    """(n, D) mean of the tokens of each row."""
    values_TD = tokens.values_TD.float()
    sums_nD = values_TD.new_zeros(rows, values_TD.shape[1]).index_add(0, tokens.row_T, values_TD)
    count_n = values_TD.new_zeros(rows).index_add(0, tokens.row_T, torch.ones_like(tokens.time_T))
    return (sums_nD / count_n.clamp_min(1.0)[:, None]).to(tokens.values_TD.dtype)
