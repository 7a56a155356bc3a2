"""Text: a token a word, subword or byte, with a trainable embedding. T tokens, D width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from moemm.data.catalogue import ModalityInfo
from moemm.data.sample import PackedModality, Value
from moemm.data.vocabulary import Vocabulary, fit_subwords, fit_words
from moemm.modalities.base import ModalitySpec, Tokenizer, Tokens, sequence_positions, unknown_time
from moemm.modalities.registry import register_modality
from moemm.modalities.signal import ranges
from moemm.modalities.targets import Targets, TargetShape, class_targets


@register_modality("text")
class Text(Tokenizer):
    """Ids made by the loader's workers -> embeddings. The vocabulary is fitted on the train split."""

    defaults: ClassVar[Mapping[str, Any]] = {
        "vocabulary": "word",
        "vocab_size": 8192,
        "max_tokens": 256,
        "dropout": 0.0,
    }

    def __init__(self, spec: ModalitySpec, dim: int):
        super().__init__(spec, dim)
        self.vocabulary_size = vocabulary_of(spec).size
        self.embedding_VD = nn.Parameter(torch.randn(self.vocabulary_size, dim) * 0.5)

    @classmethod
    def fit(cls, info: ModalityInfo, options: Mapping[str, Any], values: Iterable[Value]) -> dict[str, Any]:
        """Words or merges of the train split; nothing for bytes."""
        del info
        texts = (cast(str, value) for value in values)
        size = int(options["vocab_size"])
        if options["vocabulary"] == "word":
            return {"entries": fit_words(texts, size=size)}
        return {"entries": fit_subwords(texts, size=size) if options["vocabulary"] == "subword" else []}

    @classmethod
    def prepare(cls, spec: ModalitySpec) -> Callable[[Value], Value]:
        """Text -> ids, in the worker."""
        return cast(Callable[[Value], Value], vocabulary_of(spec))

    def forward(self, packed: PackedModality) -> Tokens:
        """Ids of all rows joined (T,) -> T tokens."""
        assert packed.lengths is not None, "text is ragged"
        row_T, index_T = ranges(packed.lengths)
        values_TD = F.embedding(packed.fields["data"].long(), self.embedding_VD)
        return self.drop(Tokens(values_TD, row_T, sequence_positions(index_T), unknown_time(index_T)))

    @property
    def target_shape(self) -> TargetShape:
        """The vocabulary."""
        return TargetShape(classes=self.vocabulary_size)

    def targets(self, packed: PackedModality) -> Targets:
        """The ids."""
        return class_targets(packed.fields["data"].long())


def vocabulary_of(spec: ModalitySpec) -> Vocabulary:
    """The vocabulary that a spec stores."""
    return Vocabulary(spec.options["vocabulary"], spec.fitted["entries"], max_tokens=int(spec.options["max_tokens"]))
