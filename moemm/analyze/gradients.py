"""Gradients of several losses with respect to the same parameters: their products, by part of the model.

A part is what one can give to each modality or task: the attention of a block, one expert, a tokenizer. Products of
parts that have no parameter in common add up, so those of all experts of a layer, or of the layer, are sums.

T losses, M modalities, P parameters, S tokens, D width, X = T M pairs of loss and modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from moemm.models import Model


class Part(NamedTuple):
    """layer: of the block, None outside the blocks. kind: `attention`, `norm`, `expert`, `router`, `ffn`, `tokenizer`,
    `latents`, `missing`, `pool`; sums are `experts` and `layer`, and `group` of a group of experts. name: of an expert,
    group or tokenizer, else empty.
    """  # fmt: skip

    layer: int | None
    kind: str
    name: str = ""

    @property
    def title(self) -> str:
        """As tables and tags name it."""
        what = f"{self.kind} {self.name}" if self.name else self.kind
        return what if self.layer is None else f"layer {self.layer}" if self.kind == "layer" else f"{self.layer} {what}"


def part_of(name: str) -> Part | None:
    """The part that a parameter of the model belongs to, by its name; None for those of one loss alone."""
    words = name.split(".")
    if words[:2] == ["trunk", "blocks"]:
        return _part_of_block(int(words[2]), words[3:])
    if words[0] in ("tokenizers", "modality_D"):
        return Part(None, "tokenizer", words[1])
    if words[0] in ("latents", "missing"):
        return Part(None, words[0])
    return Part(None, "pool") if words[:2] in (["trunk", "norm"], ["heads", "pool"]) else None


def _part_of_block(layer: int, words: Sequence[str]) -> Part:
    if words[0] == "ffn_norm":
        return Part(layer, "norm")
    if words[0] != "ffn":
        return Part(layer, "attention")
    if words[1] in ("shared", "experts"):
        return Part(layer, "expert", words[2])
    return Part(layer, "router" if words[1] == "router" else "ffn")


class Products(NamedTuple):
    """Of one batch and the parameters of one part, float64.

    gram_PTT: product of the losses' gradients, for each parameter. same_PMTT: of what the tokens of each modality bring
    to them, for experts; None elsewhere.
    """

    gram_PTT: np.ndarray
    same_PMTT: np.ndarray | None


class Seen(NamedTuple):
    """Of one batch and one part, (T, T) float64; NaN where not both losses reach a parameter of it.

    cos_TT: cosine of the gradients. same_TT: the share of it that the products within each modality make up; the rest
    of the cosine is between modalities. by_MTT: cosines of what the tokens of each modality bring.
    """

    cos_TT: np.ndarray
    same_TT: np.ndarray | None
    by_MTT: np.ndarray | None


def cosines(parts: Sequence[Products]) -> Seen:
    """Cosines over all parameters of the parts that both losses reach."""
    gram_PTT = np.concatenate([part.gram_PTT for part in parts])
    cos_TT, length_TT = _cosine(gram_PTT)
    same = [part.same_PMTT for part in parts if part.same_PMTT is not None]
    if len(same) < len(parts):
        return Seen(cos_TT, None, None)
    same_PMTT = np.concatenate(same)
    by_MTT = np.stack([_cosine(same_PMTT[:, number])[0] for number in range(same_PMTT.shape[1])])
    with np.errstate(invalid="ignore", divide="ignore"):
        return Seen(cos_TT, same_PMTT.sum((0, 1)) / length_TT, by_MTT)


def _cosine(gram_PTT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, T) cosine, and the product of lengths under it, 0 where no parameter is reached by both."""
    square_PT = np.diagonal(gram_PTT, axis1=1, axis2=2)
    both_PTT = (square_PT[:, :, None] > 0) & (square_PT[:, None, :] > 0)
    left_TT = (both_PTT * square_PT[:, :, None]).sum(0)
    length_TT = np.sqrt(left_TT * left_TT.T)
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram_PTT.sum(0) / length_TT, length_TT


@dataclass(slots=True)
class _Tap:
    """What a forward pass showed of one block: (S, D) output of its experts, and the modality of each token."""

    out_SD: torch.Tensor
    modality_S: torch.Tensor


@contextmanager
def tapped(model: Model) -> Iterator[dict[int, _Tap]]:
    """While it is open, a forward pass leaves here what `products` needs: layer -> tap."""
    taps: dict[int, _Tap] = {}
    tasks = max(1, len(model.map.tasks))
    rows: dict[int, torch.Tensor] = {}

    def before(layer: int, args: tuple[Any, ...]) -> None:
        rows[layer] = args[1]

    def after(layer: int, out: Any) -> None:
        taps[layer] = _Tap(out if isinstance(out, torch.Tensor) else out[0], rows[layer] // tasks)

    handles = []
    for layer, block in enumerate(model.trunk.blocks):
        handles.append(block.register_forward_pre_hook(lambda _, args, at=layer: before(at, args)))
        ffn: Any = block.ffn
        handles.append(ffn.register_forward_hook(lambda _, args, out, at=layer: after(at, out)))
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def products(model: Model, losses: Mapping[str, torch.Tensor | None], taps: Mapping[int, _Tap]) -> dict[Part, Products]:
    """Products of the gradients of losses with respect to the parameters of each part that is shared.

    losses: scalars of one forward pass under `tapped`; None: the batch has nothing of it. The parameters of a block's
    experts get their gradients modality by modality: what its tokens bring is that of the experts' output there.
    """
    own: dict[Part, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is not None and parameter.requires_grad:
            own.setdefault(part, []).append(parameter)
    inner = {part for part in own if part.kind in ("expert", "router", "ffn") and part.layer in taps}
    outer = [parameter for part, parameters in own.items() if part not in inner for parameter in parameters]
    modalities = range(len(model.map.modalities))
    rows: dict[int, list[torch.Tensor | None]] = {}
    for loss in losses.values():
        found = _of_loss(loss, outer, taps, {part: own[part] for part in own if part in inner}, modalities)
        for key, value in found.items():
            rows.setdefault(key, []).extend(value)
    return {part: _join([rows[id(one)] for one in own[part]], len(losses), part in inner) for part in own}


def _of_loss(
    loss: torch.Tensor | None,
    outer: Sequence[nn.Parameter],
    taps: Mapping[int, _Tap],
    inner: Mapping[Part, Sequence[nn.Parameter]],
    modalities: range,
) -> dict[int, list[torch.Tensor | None]]:
    """id of a parameter -> its gradient; for experts one for each modality; None where there is none."""
    layers = list(taps)
    of_layer = {at: [p for part, own in inner.items() if part.layer == at for p in own] for at in layers}
    if loss is None:
        nothing: dict[int, list[torch.Tensor | None]] = {id(one): [None] for one in outer}
        return nothing | {id(one): [None for _ in modalities] for own in of_layer.values() for one in own}
    outs = [taps[at].out_SD for at in layers]
    grads = torch.autograd.grad(loss, [*outs, *outer], retain_graph=True, allow_unused=True)
    found: dict[int, list[torch.Tensor | None]] = {}
    for at, grad_SD in zip(layers, grads, strict=False):
        for number in modalities:
            bring = _of_modality(taps[at], grad_SD, number, of_layer[at])
            for one, value in zip(of_layer[at], bring, strict=True):
                found.setdefault(id(one), []).append(value)
    return found | {id(one): [grad] for one, grad in zip(outer, grads[len(layers) :], strict=True)}


def _of_modality(
    tap: _Tap, grad_SD: torch.Tensor | None, number: int, parameters: Sequence[nn.Parameter]
) -> Sequence[torch.Tensor | None]:
    """The gradients that the tokens of one modality bring to the parameters of a block's experts."""
    if grad_SD is None or not parameters:
        return [None] * len(parameters)
    own_SD = grad_SD * (tap.modality_S == number)[:, None]
    if not own_SD.any():
        return [None] * len(parameters)
    return torch.autograd.grad(tap.out_SD, list(parameters), own_SD, retain_graph=True, allow_unused=True)


def _join(rows_PX: Sequence[Sequence[torch.Tensor | None]], num_losses: int, by_modality: bool) -> Products:
    """rows_PX: for each parameter one gradient a loss, or one a loss and modality, losses outside."""
    grams = []
    same = []
    for rows_X in rows_PX:
        gram_XX = _gram(rows_X)
        if not by_modality:
            grams.append(gram_XX)
            continue
        block_TMTM = gram_XX.reshape(num_losses, -1, num_losses, gram_XX.shape[0] // num_losses)
        grams.append(block_TMTM.sum((1, 3)))
        same.append(np.einsum("imjm->mij", block_TMTM))
    return Products(np.stack(grams), np.stack(same) if by_modality else None)


def _gram(rows_X: Sequence[torch.Tensor | None]) -> np.ndarray:
    """(X, X) products in float64; 0 where a gradient is not there."""
    gram_XX = np.zeros((len(rows_X), len(rows_X)))
    there = [number for number, row in enumerate(rows_X) if row is not None]
    if there:
        known = torch.stack([row.detach().double().flatten() for row in rows_X if row is not None])
        gram_XX[np.ix_(there, there)] = (known @ known.T).cpu().numpy()
    return gram_XX
