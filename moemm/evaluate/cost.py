"""What each modality costs: tokens and floating-point operations of the forward pass, counted while a model runs.

T tokens, B samples, M rows of the expert map, L layers with a router, E routed experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moemm.models import Model
from moemm.models.stream import Stream
from moemm.moe import Expert, MoELayer


@dataclass
class Cost:
    """modality -> part -> operations (a multiply-add counts as two), and modality -> tokens. See count_cost."""

    operations: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """modality -> its share of all operations; 0 where nothing ran."""
        totals = {name: sum(parts.values()) for name, parts in self.operations.items()}
        whole = sum(totals.values())
        return {name: total / whole if whole else 0.0 for name, total in totals.items()}


@contextmanager
def count_cost(model: Model) -> Iterator[Cost]:
    """Count what runs inside; the cost is complete on leaving.

    tokenizer: its matrix products, with the rows that it had. attention: projections, and query x key and weights x
    value inside each sample; latents: the same where they stand in for tokens. experts: every expert that a token went
    to, by the routers' own counts. position, router, pooling: their matrix products. Norms, activations, embeddings,
    the heads (once a sample) and what predicts absent modalities are not counted; the tokens that stand in are.
    """
    counts = _Counts(model)
    cost = Cost()
    with ExitStack() as stack:
        for handle in counts.hooks():
            stack.callback(handle.remove)
        yield cost
    counts.write(cost)


class _Counts:
    """Sums over the batches, and the hooks that collect them."""

    def __init__(self, model: Model) -> None:
        self._model = model
        num_rows = len(model.map.rows)
        self._tokens_M, self._pairs_M, self._pooled_M = torch.zeros(3, num_rows, dtype=torch.float64)
        self._load_LME: torch.Tensor | None = None
        self._tokenizers, self._raw, self._latents = (dict.fromkeys(model.tokenizers, 0.0) for _ in range(3))

    def hooks(self) -> Iterator[Any]:
        """Handles of all hooks."""
        yield self._model.trunk.register_forward_pre_hook(self._see_stream)
        yield self._model.register_forward_hook(self._see_output)
        if self._model.latents is not None:
            yield self._model.latents.register_forward_pre_hook(self._see_latents)
        for name, tokenizer in self._model.tokenizers.items():
            yield tokenizer.register_forward_hook(self._tokens(name))
            for module in tokenizer.modules():
                if isinstance(module, nn.Linear):
                    yield module.register_forward_hook(self._linear(name))

    def _see_stream(self, module: nn.Module, given: tuple[Stream]) -> None:
        (stream,) = given
        row_T = self._model.map.row(stream.modality_T, stream.task_B[stream.sample_T])
        length_B = torch.bincount(stream.sample_T, minlength=stream.num_samples)
        num_rows = len(self._tokens_M)
        self._tokens_M += torch.bincount(row_T, minlength=num_rows).cpu()
        lengths_T = length_B[stream.sample_T].double()
        self._pairs_M += torch.bincount(row_T, weights=lengths_T, minlength=num_rows).cpu()
        pools_T = self._model.heads.num_pools(stream.task_B)[stream.sample_T].double()
        self._pooled_M += torch.bincount(row_T, weights=pools_T, minlength=num_rows).cpu()

    def _see_output(self, module: nn.Module, given: Any, output: Any) -> None:
        if output.router is not None:
            load_LME = output.router.load_LME.double().cpu()
            self._load_LME = load_LME if self._load_LME is None else self._load_LME + load_LME

    def _see_latents(self, module: nn.Module, given: tuple[Any, Sequence[torch.Tensor], Any]) -> None:
        """The attention in which the latents of each row see its tokens, and these each other."""
        parts, rows, _ = given
        dim = self._model.config.dim
        for name, (_, sample_T), row_n in zip(self._latents, parts, rows, strict=True):
            samples = int(row_n.max()) + 1 if len(row_n) else 0
            length_n = torch.bincount(sample_T, minlength=samples)[row_n] + self._model.config.latents
            self._latents[name] += _attention(dim, float(length_n.sum()), float(length_n.square().sum()))

    def _tokens(self, name: str) -> Any:
        def see(module: nn.Module, given: Any, out: Any) -> None:
            self._raw[name] += out.row_T.shape[0]

        return see

    def _linear(self, name: str) -> Any:
        def see(module: nn.Linear, given: Any, out: torch.Tensor) -> None:
            self._tokenizers[name] += 2.0 * module.in_features * out.numel()

        return see

    def write(self, cost: Cost) -> None:
        """Fill in the cost."""
        model, dim, depth = self._model, self._model.config.dim, len(self._model.trunk.blocks)
        experts_M, router_M = self._ffn_rows()
        parts = {
            "attention": depth * _attention(dim, self._tokens_M, self._pairs_M),
            "experts": experts_M,
            "router": router_M,
            "pooling": 4.0 * dim**2 * self._pooled_M * (depth if model.config.predict_every_block else 1),
        }
        place = 2.0 * model.position.project.weight.numel()
        tasks = max(1, len(model.map.tasks))
        for number, name in enumerate(model.map.modalities):
            rows = slice(number * tasks, (number + 1) * tasks)
            cost.operations[name] = {"tokenizer": self._tokenizers[name], "position": place * self._raw[name]}
            if model.latents is not None:
                cost.operations[name]["latents"] = self._latents[name]
            cost.operations[name] |= {part: float(values_M[rows].sum()) for part, values_M in parts.items()}
            cost.tokens[name] = int(self._tokens_M[rows].sum())

    def _ffn_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(M,) operations of the experts, or of dense networks, and of the routers."""
        trunk = self._model.trunk
        experts_M, router_M = torch.zeros_like(self._tokens_M), torch.zeros_like(self._tokens_M)
        load_LME = dict(zip(trunk.routed_layers, self._load_LME if self._load_LME is not None else (), strict=False))
        for number, block in enumerate(trunk.blocks):
            ffn = block.ffn
            assert isinstance(ffn, nn.Module)
            if not isinstance(ffn, MoELayer):
                experts_M += 2.0 * _parameters(ffn) * self._tokens_M
                continue
            experts_M += 2.0 * self._expert_weights(ffn, load_LME.get(number))
            if ffn.router is not None:
                router_M += 2.0 * _parameters(ffn.router.rows) * self._tokens_M
        return experts_M, router_M

    def _expert_weights(self, layer: MoELayer, load_ME: torch.Tensor | None) -> torch.Tensor:
        """(M,) weights that the tokens of each row met in a layer's experts."""
        rows = self._model.map.rows
        always = [expert for expert in layer.map.experts if expert.role != "routed"]
        each_M = [sum(_size(layer, expert) for expert in always if expert.serves(*row)) for row in rows]
        met_M = torch.tensor(each_M, dtype=torch.float64) * self._tokens_M
        if load_ME is None:
            return met_M
        sizes = {expert.id: _size(layer, expert) for expert in layer.map.of_role("routed")}
        routed = [sizes.get(expert.id, 0) for expert in self._model.map.of_role("routed")]
        return met_M + load_ME @ torch.tensor(routed, dtype=torch.float64)


def _attention(dim: int, tokens: Any, pairs: Any) -> Any:
    """Operations of one attention: four projections of each token, and two products of each pair of tokens."""
    return 8.0 * dim**2 * tokens + 4.0 * dim * pairs


def _size(layer: MoELayer, expert: Expert) -> int:
    """Weights that a token meets in an expert; a lora expert runs as its base does, with changed weights."""
    networks = {**layer.shared, **layer.experts}
    found = networks.get(expert.base or expert.id)
    return _parameters(found) if found is not None else 0


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
