"""What a modality is: a file that says how its values become tokens.

n rows (samples that have it), T tokens, D width, P = 3 position axes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Value
from moemm.exact import ExactBuffers
from moemm.modalities.targets import Targets, TargetShape

AXES = 3
"""Position axes: place in the sequence (counted in tokens), then two spatial ones in [-1, 1]."""


class Tokens(NamedTuple):
    """Tokens of one modality, those of a row together, rows in order.

    values_TD: (T, D). row_T: (T,) int64, the row each belongs to. position_TP: (T, 3) float32, see AXES.
    time_T: (T,) float32 seconds from the start of the sample, NaN where the rate is not known.
    source_T: (T,) int64, the number of each token before `drop`; None where none was left out.
    """

    values_TD: torch.Tensor
    row_T: torch.Tensor
    position_TP: torch.Tensor
    time_T: torch.Tensor
    source_T: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModalitySpec:
    """All that is needed to build a tokenizer again: plain data, stored with the run as modalities.json.

    options: the kind's defaults with the config's choices over them. fitted: what was learned from the train split
    (statistics, vocabulary), JSON types only.
    """

    info: ModalityInfo
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    fitted: dict[str, Any] = field(default_factory=dict)


class Tokenizer(ExactBuffers, ABC):
    """Base of all tokenizers; a subclass is one modality kind.

    defaults: the options (fields of ModalityConfig) that the kind knows, with their values where none is given.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__()
        self.spec, self.dim = spec, dim

    @classmethod
    def fit(cls, info: ModalityInfo, options: Mapping[str, Any], values: Iterable[Value]) -> dict[str, Any]:
        """Learn statistics or a vocabulary from the train split; the default learns nothing."""
        del info, options, values
        return {}

    @classmethod
    def prepare(cls, spec: ModalitySpec) -> Callable[[Value], Value] | None:
        """A function that the loader's workers apply to each value (text -> ids), or None."""
        del spec
        return None

    @property
    def target_shape(self) -> TargetShape | None:
        """What `targets` gives; None: the kind cannot be hidden and told again."""
        return None

    def targets(self, packed: PackedModality) -> Targets:
        """What each token holds, for the decoder of masked modelling to tell; reads no parameter, only constants.

        Called where `target_shape` is not None. ZeRO-3 has taken the parameters away by then.
        """
        raise NotImplementedError(f"{type(self).__name__} has a target_shape, and so must have targets")

    @abstractmethod
    def forward(self, packed: PackedModality) -> Tokens:
        """Tokens of all rows; zero rows give zero tokens and still reach every parameter."""

    def drop(self, tokens: Tokens) -> Tokens:
        """Leave out a share of the tokens while training; the first of each row stays, so none is left empty."""
        share = self.spec.options.get("dropout") or 0.0
        if not (self.training and share and tokens.row_T.numel()):
            return tokens
        first_T = torch.ones_like(tokens.row_T, dtype=torch.bool)
        first_T[1:] = tokens.row_T[1:] != tokens.row_T[:-1]
        keep_T = first_T | (torch.rand(tokens.row_T.shape, device=tokens.row_T.device) >= share)
        values_TD, row_T, position_TP, time_T, _ = tokens
        source_T = keep_T.nonzero().flatten()
        return Tokens(values_TD[keep_T], row_T[keep_T], position_TP[keep_T], time_T[keep_T], source_T)


def grid_positions(*sizes: int) -> torch.Tensor:
    """(product, 3) positions of a grid (frames, height, width): the frame's number, then y and x in [-1, 1]."""
    frames, height, width = sizes
    axes = [torch.arange(frames, dtype=torch.float32), _centred(height), _centred(width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, AXES)


def sequence_positions(index_T: torch.Tensor) -> torch.Tensor:
    """(T, 3) positions of tokens in a sequence: their number, at the middle of the spatial axes."""
    position_TP = torch.zeros(index_T.shape[0], AXES, device=index_T.device)
    position_TP[:, 0] = index_T
    return position_TP


def unknown_time(index_T: torch.Tensor) -> torch.Tensor:
    """(T,) NaN: the rate is not known."""
    return torch.full(index_T.shape, float("nan"), device=index_T.device)


def _centred(size: int) -> torch.Tensor:
    """`size` cell centres in [-1, 1]."""
    return (torch.arange(size, dtype=torch.float32) + 0.5) * (2.0 / size) - 1.0
