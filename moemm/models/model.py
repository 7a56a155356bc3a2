"""The whole model: tokenizers -> one packed stream -> trunk -> heads. T tokens, D width, C outputs of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from moemm.config.schema import ModelConfig
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.harmonize import Fork, LossScale, Readers, Settler
from moemm.modalities import ModalitySpec, build_tokenizer
from moemm.models.heads import Heads
from moemm.models.latents import Latents
from moemm.models.missing import build_missing
from moemm.models.position import FourierPosition
from moemm.models.stream import Stream, join
from moemm.models.trunk import Trunk
from moemm.models.untied import share_groups
from moemm.models.views import Pretext, Sums, Views
from moemm.moe import ExpertMap, MoELayer, RouterStats, active_experts


@dataclass  # without slots: DeepSpeed's ZeRO-3 hooks read vars() of what a module returns
class ModelOutput:
    """outputs: task -> (its samples, C) fp32, every task, also with zero rows. num_tokens: of the packed stream.

    earlier: the same after each block but the last, with `model.predict_every_block`.
    missing: sum over samples of the regression's loss, while a model that predicts absent modalities trains.
    pretext: losses of the objectives without labels, while training with some.
    learned: what the optimizer learns for the weights of the losses, while training with such a `harmonize.scale`.
    """

    outputs: dict[str, torch.Tensor]
    router: RouterStats | None
    num_tokens: int
    earlier: list[dict[str, torch.Tensor]] = field(default_factory=list)
    missing: torch.Tensor | None = None
    pretext: Sums = field(default_factory=dict)
    learned: torch.Tensor | None = None


class Model(nn.Module):
    """A sparse mixture of experts over any number of modalities; see build_model."""

    def __init__(self, config: ModelConfig, specs: Mapping[str, ModalitySpec], tasks: Sequence[TaskInfo]):
        super().__init__()
        self.config, self.tasks = config, tuple(tasks)
        names = [task.name for task in tasks]
        groups, extensions = config.experts.groups, config.extensions
        self.map = ExpertMap.from_config(groups, list(specs), names, config.layers, extensions)
        self.tokenizers = nn.ModuleDict({name: build_tokenizer(spec, config.dim) for name, spec in specs.items()})
        self.modality_D = nn.ParameterDict({name: torch.randn(config.dim) * 0.2 for name in specs})
        self.position = FourierPosition(config.dim)
        self.groups = share_groups(self.map.modalities, config.share)
        self.latents = Latents(self.groups, config.dim, config.heads, config.latents) if config.latents else None
        self.trunk = Trunk(config, self.map)
        self.heads = Heads(tasks, config.dim, config.heads, dropout=config.dropout)
        self.missing = build_missing(config, list(specs), tasks)  # last: the other weights are the same with each kind
        self.pretext: Pretext | None = None
        """Set after building, so that the other weights are those of a model without it."""
        self.fork: Fork | None = None
        """What settles conflicts between the losses' gradients; set after building, for training."""
        self.settler: Settler | None = None
        """The same for gradients of parameters; it is here so that checkpoints have its state."""
        self.scale: LossScale | None = None
        """What weighs the losses; set after building, for training."""

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """Outputs of every task for the samples of a batch. Modalities must be those of the model, in its order."""
        assert list(batch.modalities) == list(self.tokenizers), "the batch was packed for another catalogue"
        output = self._output(batch)
        if self.scale is not None and self.training:
            output.learned = self.scale()
        return output

    def _output(self, batch: PackedBatch) -> ModelOutput:
        if self.pretext is not None and self.training:
            return self._with_pretext(self.pretext, batch)
        stream = self.tokenize(batch)
        (*states, last_TD), stats, expert_T = self.trunk(stream, by_expert=self._by_expert)
        earlier = [self.heads(x_TD, stream.sample_T, batch.task) for x_TD in states]
        own: torch.Tensor | Sequence[torch.Tensor] = last_TD
        if self.fork is not None and self.training:
            own = self.fork(last_TD, self._readers(stream, self.heads.losses(stream.sample_T, batch.task), expert_T))
        last = self.heads(own, stream.sample_T, batch.task)
        return ModelOutput(last, stats, stream.values_TD.shape[0], earlier, stream.missing)

    def _with_pretext(self, pretext: Pretext, batch: PackedBatch) -> ModelOutput:
        """The same on several views of the batch, for objectives without labels; the heads read the first."""
        tokens = [self.tokenizers[name](packed) for name, packed in batch.modalities.items()]
        views = pretext.views(tokens, join(tokens, batch), batch, self.tokenizers)  # type: ignore[arg-type]
        name, first = next(iter(views.parts.items()))
        (*states, last_TD), stats, expert_T = self.trunk(self.place(views.stream), by_expert=self._by_expert)
        earlier = [self.heads(views.split(x_TD)[name], first.sample_T, batch.task) for x_TD in states]
        own: torch.Tensor | Sequence[torch.Tensor]
        keep_B = None
        if self.fork is None:
            own, others = views.split(last_TD)[name], (last_TD,)
        else:
            stream = replace(views.stream, sample_T=pretext.owners(views))
            readers = self._readers(stream, self._losses(pretext, views, batch), expert_T)
            if self.fork.drops and pretext.pairs_meet:
                keep_B = self._judge(self.fork, pretext, (last_TD, readers, views))[: batch.num_samples]
            branches = self.fork(last_TD, readers)
            own = [views.split(x_TD)[name] for x_TD in branches[: self.heads.num_passes]]
            others = branches[self.heads.num_passes :]
        last = self.heads(own, first.sample_T, batch.task)
        sums = pretext(others, views, keep_B=keep_B)
        return ModelOutput(last, stats, views.stream.values_TD.shape[0], earlier, pretext=sums)

    @property
    def _by_expert(self) -> bool:
        return self.training and self.fork is not None and self.fork.per == "expert"

    def _readers(self, stream: Stream, loss_BT: torch.Tensor, expert_T: torch.Tensor | None) -> Readers:
        num_samples, num_modalities = stream.presence_BM.shape
        last = self.trunk.blocks[-1].ffn
        num_experts = last.num_choices if isinstance(last, MoELayer) else 0
        own = (loss_BT, stream.sample_T, stream.modality_T, num_samples, num_modalities)
        return Readers(*own, expert_T, num_experts)

    def _judge(self, fork: Fork, pretext: Pretext, known: tuple[torch.Tensor, Readers, Views]) -> torch.Tensor:
        """Which samples' pairs agree, by a first pass of their loss alone."""
        last_TD, readers, views = known
        own = readers._replace(loss_BT=readers.loss_BT[self.heads.num_passes :])
        return fork.judge(last_TD, own, lambda leaves: pretext.pairs_loss(leaves, views))

    def _losses(self, pretext: Pretext, views: Views, batch: PackedBatch) -> torch.Tensor:
        """(B, T) int64: of which loss, the tasks' first, is what each branch brings to the views' tokens."""
        name, first = next(iter(views.parts.items()))
        own = [views.spread({name: loss_T}, other=-1) for loss_T in self.heads.losses(first.sample_T, batch.task)]
        others_BT = pretext.readers(views)
        return torch.cat([torch.stack(own), torch.where(others_BT >= 0, others_BT + len(self.tasks), -1)])

    def tokenize(self, batch: PackedBatch) -> Stream:
        """The packed stream: tokens + modality embedding + position and time; with `model.latents`, what stands for
        them.
        """  # fmt: skip
        parts = [self.tokenizers[name](packed) for name, packed in batch.modalities.items()]
        stream = self.place(join(parts, batch))
        if self.latents is not None:
            rows = [packed.sample for packed in batch.modalities.values()]
            stream = self.latents.replace(stream, rows, self.trunk.backend(stream.values_TD))
        if self.missing is not None:
            absent = self.missing.absent(batch)
            values_AD, stream.missing = self.missing(absent, parts, batch)
            stream = stream.extended(absent, values_AD + self._embedding()[absent.modality_A])
        return stream

    def place(self, stream: Stream) -> Stream:
        """Add modality embedding, position and time to the tokens of a stream, in place."""
        place_TD = self.position(stream.position_TP, stream.time_T)
        stream.values_TD = stream.values_TD + self._embedding()[stream.modality_T] + place_TD
        return stream

    def _embedding(self) -> torch.Tensor:
        """(M, D); by name, because a ParameterDict sorts its keys."""
        return torch.stack([self.modality_D[name] for name in self.tokenizers])

    def num_parameters(self) -> tuple[int, int]:
        """(all parameters, those that one token and its task's head pass through at most).

        Counted on whole shapes, also where ZeRO-3 has partitioned them.
        """
        return sum(self._sizes().values()), max(self.active_parameters(*row) for row in self.map.rows)

    def active_parameters(self, modality: str, task: str | None = None) -> int:
        """Parameters that a token of `modality` passes through at most, with its tokenizer and the largest head.

        task: whose skills the experts are, where some expert names tasks.
        """
        count = self._sizes()
        group = self.groups[self.map.modalities.index(modality)]
        own = [("tokenizers.", modality), ("modality_D.", modality), ("heads.linear.", None), ("members.", group)]
        own += [("own_norms.", modality)]
        own += [("pretext.", ""), ("scale.", "")]  # for training only: no token of a prediction meets it
        own += [(f"latents.{part}.", group) for part in ("start", "norm", "attention")]
        own += [("missing.", "")]  # what stands in for a modality is met by no token of a signal
        met = sum(number for name, number in count.items() if not any(_after(name, prefix) for prefix, _ in own))
        for prefix, wanted in own:
            sizes: dict[str, int] = {}
            for name, number in count.items():
                key = _after(name, prefix)
                if key is not None:
                    sizes[key] = sizes.get(key, 0) + number
            met += max(sizes.values(), default=0) if wanted is None else sizes.get(wanted, 0)
        return met - sum(self._idle(count, number, (modality, task)) for number in self._moe_layers)

    @property
    def _moe_layers(self) -> list[int]:
        return [number for number, block in enumerate(self.trunk.blocks) if isinstance(block.ffn, MoELayer)]

    def _idle(self, count: Mapping[str, int], layer: int, row: tuple[str, str | None]) -> int:
        """Parameters of a layer's experts, and of routers of other modalities, that a token of `row` does not meet."""
        prefix = f"trunk.blocks.{layer}.ffn."
        sizes = {**_sums(count, f"{prefix}shared."), **_sums(count, f"{prefix}experts.")}
        top_k = active_experts(self.config.router)
        used = self.map.at_layer(layer).active(row, lambda expert: sizes.get(expert.id, 0), top_k=top_k)
        scopes = _sums(count, f"{prefix}router.rows.")
        others = sum(number for name, number in scopes.items() if name not in ("all", row[0]))
        return sum(sizes.values()) - used + others

    def _sizes(self) -> dict[str, int]:
        return {name: int(getattr(p, "ds_numel", p.numel())) for name, p in self.named_parameters()}


def build_model(config: ModelConfig, *, specs: Mapping[str, ModalitySpec], tasks: Sequence[TaskInfo]) -> Model:
    """A model with fresh weights for these modalities and tasks, both in a fixed order.

    Raises ConfigError where the config does not fit the modalities (a group that names an unknown one, say).
    """
    return Model(config, specs, tasks)


def _after(name: str, prefix: str) -> str | None:
    """The part of a parameter's name that follows `prefix`; None where it does not stand in the name."""
    _, found, rest = f".{name}".partition(f".{prefix}")
    return rest.split(".")[0] if found else None


def _sums(count: Mapping[str, int], prefix: str) -> dict[str, int]:
    """Parameters under `prefix`, summed by the next part of their name."""
    sums: dict[str, int] = {}
    for name, number in count.items():
        if name.startswith(prefix):
            key = name[len(prefix) :].split(".")[0]
            sums[key] = sums.get(key, 0) + number
    return sums
