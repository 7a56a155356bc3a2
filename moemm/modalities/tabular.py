"""Tables: a token a column. n rows, Dn numeric and Dc categorical columns, B bins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import nn

from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Table, Value
from moemm.modalities.base import ModalitySpec, Tokenizer, Tokens, sequence_positions, unknown_time
from moemm.modalities.registry import register_modality
from moemm.modalities.targets import Targets, TargetShape

NUM_BINS = 16


@register_modality("tabular")
class Tabular(Tokenizer):
    """Numeric columns as piecewise-linear codes over quantile bins of the train split (arXiv:2203.05556), categorical
    ones as embeddings. NaN and category 0 are learned missing tokens."""

    defaults: ClassVar[Mapping[str, Any]] = {"dropout": 0.0}
    low_NB: torch.Tensor
    width_NB: torch.Tensor
    first_C: torch.Tensor

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(spec, dim)
        self.num, self.cat = len(spec.info.num_names), len(spec.info.cat_names)
        edges = torch.tensor(spec.fitted["edges"], dtype=torch.float32).reshape(self.num, NUM_BINS + 1)
        self.register_buffer("low_NB", edges[:, :-1].contiguous(), persistent=False)
        self.register_buffer("width_NB", edges.diff(dim=1), persistent=False)
        self.bins_NBD = _parameter(self.num, NUM_BINS, dim, std=0.2)
        self.missing_ND = _parameter(self.num, dim, std=0.5)
        sizes = torch.tensor([0, *spec.info.cat_sizes])
        self.register_buffer("first_C", sizes.cumsum(0)[:-1], persistent=False)
        self.num_categories = int(sizes.sum())
        self.category_SD = _parameter(self.num_categories, dim, std=0.5)
        self.column_CD = nn.Parameter(torch.randn(self.num + self.cat, dim) * 0.5)

    @classmethod
    def fit(cls, info: ModalityInfo, options: Mapping[str, Any], values: Iterable[Value]) -> dict[str, Any]:
        """Quantile edges of every numeric column over the train split, made strictly rising."""
        del options
        columns = np.stack([cast(Table, value).num for value in values]).astype(np.float64)
        return {"edges": [_edges(columns[:, i]) for i in range(len(info.num_names))]}

    def forward(self, packed: PackedModality) -> Tokens:
        """num (n, Dn) with NaN, cat (n, Dc) with 0 -> Dn + Dc tokens a row."""
        num_nN, cat_nC = packed.fields["num"].float(), packed.fields["cat"].long()
        n, columns = num_nN.shape[0], self.num + self.cat
        parts = [] if self.bins_NBD is None else [self._numbers(num_nN)]
        if self.category_SD is not None:
            parts.append(self.category_SD[cat_nC + self.first_C])
        values_TD = (torch.cat(parts, dim=1) + self.column_CD).flatten(0, 1)
        column_T = torch.arange(columns, device=num_nN.device).repeat(n)
        row_T = torch.arange(n, device=num_nN.device).repeat_interleave(columns)
        return self.drop(Tokens(values_TD, row_T, sequence_positions(column_T), unknown_time(column_T)))

    @property
    def target_shape(self) -> TargetShape:
        """A value for each numeric column, a class for each category of each categorical one; a group a column."""
        return TargetShape(values=self.num, classes=self.num_categories, groups=self.num + self.cat)

    def targets(self, packed: PackedModality) -> Targets:
        """Numbers as their quantile in the train split, scaled to unit variance; categories; nothing where missing."""
        num_nN, cat_nC = packed.fields["num"].float(), packed.fields["cat"].long()
        n, columns = num_nN.shape[0], self.num + self.cat
        missing_nN = torch.isnan(num_nN)
        quantile_nN = self._codes(torch.where(missing_nN, 0.0, num_nN)).mean(-1)
        scaled_nN = torch.where(missing_nN, float("nan"), (quantile_nN - 0.5) * math.sqrt(12.0))
        values_nKN = scaled_nN.new_full((n, columns, self.num), float("nan"))
        values_nKN[:, : self.num] = torch.where(
            torch.eye(self.num, dtype=torch.bool, device=num_nN.device), scaled_nN[:, None], float("nan")
        )
        class_nK = torch.full((n, columns), -1, dtype=torch.int64, device=num_nN.device)
        class_nK[:, self.num :] = torch.where(cat_nC > 0, cat_nC + self.first_C, -1)
        column_T = torch.arange(columns, device=num_nN.device).repeat(n)
        return Targets(values_nKN.flatten(0, 1), class_nK.flatten(), column_T)

    def _codes(self, num_nN: torch.Tensor) -> torch.Tensor:
        """(n, Dn) without NaN -> (n, Dn, B): how far each bin is filled."""
        return ((num_nN[..., None] - self.low_NB) / self.width_NB).clamp(0.0, 1.0)

    def _numbers(self, num_nN: torch.Tensor) -> torch.Tensor:
        """(n, Dn) -> (n, Dn, D)."""
        assert self.bins_NBD is not None and self.missing_ND is not None, "called where there are numeric columns"
        missing_nN = torch.isnan(num_nN)
        code_nNB = self._codes(torch.where(missing_nN, 0.0, num_nN))
        value_nND = torch.einsum("nib,ibd->nid", code_nNB.to(self.bins_NBD.dtype), self.bins_NBD)
        return torch.where(missing_nN[..., None], self.missing_ND, value_nND)


def _parameter(*shape: int, std: float) -> nn.Parameter | None:
    """Normal weights, or None where there are no columns: ZeRO-3 cannot gather a parameter without elements."""
    return nn.Parameter(torch.randn(*shape) * std) if shape[0] else None


def _edges(column: np.ndarray) -> list[float]:
    """NUM_BINS + 1 rising edges: quantiles of the finite values, spread where many are equal."""
    seen = column[np.isfinite(column)]
    if not seen.size:
        return np.linspace(0.0, 1.0, NUM_BINS + 1).tolist()
    edges = np.unique(np.quantile(seen, np.linspace(0, 1, NUM_BINS + 1)))
    if edges.size == 1:
        edges = np.array([edges[0], edges[0] + 1.0])
    return np.interp(np.linspace(0, edges.size - 1, NUM_BINS + 1), np.arange(edges.size), edges).tolist()
