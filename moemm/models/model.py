"""The whole model: tokenizers -> one packed stream -> trunk -> heads. T tokens, D width, C outputs of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moemm.config.schema import ModelConfig
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.modalities import ModalitySpec, build_tokenizer
from moemm.models.heads import Heads
from moemm.models.position import FourierPosition
from moemm.models.stream import Stream, join
from moemm.models.trunk import Trunk
from moemm.moe import ExpertMap, MoELayer, RouterStats

CHOSEN = ("tokenizers.", "modality_D.", "heads.linear.")
"""Parts of which a token passes through one."""


@dataclass  # without slots: DeepSpeed's ZeRO-3 hooks read vars() of what a module returns
class ModelOutput:
    """outputs: task -> (its samples, C) fp32, every task, also with zero rows. num_tokens: of the packed stream."""

    outputs: dict[str, torch.Tensor]
    router: RouterStats | None
    num_tokens: int


class Model(nn.Module):
    """A sparse mixture of experts over any number of modalities; see build_model."""

    def __init__(self, config: ModelConfig, specs: Mapping[str, ModalitySpec], tasks: Sequence[TaskInfo]):
        super().__init__()
        self.config, self.tasks = config, tuple(tasks)
        self.map = ExpertMap.from_config(config.experts, list(specs))
        self.tokenizers = nn.ModuleDict({name: build_tokenizer(spec, config.dim) for name, spec in specs.items()})
        self.modality_D = nn.ParameterDict({name: torch.randn(config.dim) * 0.2 for name in specs})
        self.position = FourierPosition(config.dim)
        self.trunk = Trunk(config, self.map)
        self.heads = Heads(tasks, config.dim, config.heads, dropout=config.dropout)

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """Outputs of every task for the samples of a batch. Modalities must be those of the model, in its order."""
        assert list(batch.modalities) == list(self.tokenizers), "the batch was packed for another catalogue"
        stream = self.tokenize(batch)
        x_TD, stats = self.trunk(stream)
        return ModelOutput(self.heads(x_TD, stream.sample_T, batch.task), stats, x_TD.shape[0])

    def tokenize(self, batch: PackedBatch) -> Stream:
        """The packed stream: tokens + modality embedding + position and time."""
        parts = [self.tokenizers[name](packed) for name, packed in batch.modalities.items()]
        stream = join(parts, batch)
        embedding_MD = torch.stack(list(self.modality_D.values()))
        place_TD = self.position(stream.position_TP, stream.time_T)
        stream.values_TD = stream.values_TD + embedding_MD[stream.modality_T] + place_TD
        return stream

    def num_parameters(self) -> tuple[int, int]:
        """(all parameters, those that one token of one modality and its task's head pass through at most).

        Counted on whole shapes, also where ZeRO-3 has partitioned them.
        """
        count = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in self.named_parameters()}
        total = sum(count.values())
        largest = sum(max(_sums(count, prefix).values()) for prefix in CHOSEN)
        always = sum(number for name, number in count.items() if not name.startswith(CHOSEN))
        return total, always + largest - self._idle_experts(count)

    def _idle_experts(self, count: Mapping[str, int]) -> int:
        """Parameters of the dispatched experts that a token does not visit."""
        idle = 0
        for name, layer in self.named_modules():
            if isinstance(layer, MoELayer) and layer.experts:
                sizes = _sums(count, f"{name}.experts.")
                modality = [sizes[e.id] for e in self.map.of_kind("modality")]
                routed = [sizes[e.id] for e in self.map.of_kind("routed")]
                used = max(modality, default=0) + sum(sorted(routed)[-self.config.experts.top_k :] if routed else [])
                idle += sum(modality) + sum(routed) - used
        return idle


def build_model(config: ModelConfig, *, specs: Mapping[str, ModalitySpec], tasks: Sequence[TaskInfo]) -> Model:
    """A model with fresh weights for these modalities and tasks, both in a fixed order.

    Raises ConfigError where the config does not fit the modalities (a group that names an unknown one, say).
    """
    return Model(config, specs, tasks)


def _sums(count: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Parameters under `prefix`, summed by the next part of their name."""
    sums: dict[str, int] = {}
    for name, number in count.items():
        if name.startswith(prefix):
            key = name[len(prefix) :].split(".")[0]
            sums[key] = sums.get(key, 0) + number
    return sums
