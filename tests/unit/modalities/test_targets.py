"""What masked modelling asks of every kind: targets that stand beside the tokens, and mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moemm.config.schema import ModalityConfig
from moemm.modalities import Targets, build_tokenizer
from moemm.testing.modality_cases import fit_case, modality_cases, pack_values, with_nan

CASES = sorted(modality_cases())


def targets_of(kind: str, **options: object):
    spec, values = fit_case(kind, config=ModalityConfig(**options) if options else None)
    torch.manual_seed(0)
    tokenizer = build_tokenizer(spec, 16)
    packed = pack_values(spec.info, values)
    return tokenizer, packed, tokenizer.targets(packed)


@pytest.mark.parametrize("kind", CASES)
def test_one_target_a_token_of_the_promised_shape(kind: str) -> None:
    tokenizer, packed, targets = targets_of(kind)
    shape, count = tokenizer.target_shape, tokenizer(packed).row_T.shape[0]
    assert targets.values_TX.shape == (count, shape.values) and targets.values_TX.dtype == torch.float32
    assert targets.class_T.shape == targets.group_T.shape == (count,)
    assert targets.class_T.min() >= -1 and targets.class_T.max() < max(shape.classes, 1)
    assert set(targets.group_T.tolist()) == set(range(shape.groups))
    told = torch.isfinite(targets.values_TX).any(1) | (targets.class_T >= 0)
    categorical = targets.group_T == 2 if kind == "tabular" else torch.zeros(count, dtype=torch.bool)
    assert told[~categorical].all(), "only a category may be missing in these cases"
    empty = tokenizer.targets(pack_values(tokenizer.spec.info, []))
    assert [part.shape[0] for part in empty] == [0, 0, 0]


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "text"])
def test_values_are_of_about_unit_variance(kind: str) -> None:
    values = targets_of(kind)[2].values_TX
    assert 0.3 < values[torch.isfinite(values)].std() < 2.0


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in ("image", "text")])
def test_what_is_missing_is_no_label(kind: str) -> None:
    tokenizer, packed, targets = targets_of(kind)
    holed = tokenizer.targets(with_nan(packed))
    if kind in ("video",):  # a block with a missing pixel keeps the others; the pixel counts as the mean
        assert torch.isfinite(holed.values_TX).all()
    elif kind != "audio":  # a missing sample of a waveform is part of whole frames
        assert torch.isfinite(holed.values_TX).sum() < torch.isfinite(targets.values_TX).sum()
    torch.testing.assert_close(holed.values_TX[-1], targets.values_TX[-1], equal_nan=True)


@pytest.mark.parametrize("kind", ["timeseries", "sensor", "audio_mfcc"])
def test_noise_is_in_the_tokens_and_not_in_the_targets(kind: str) -> None:
    tokenizer, packed, targets = targets_of(kind, noise=0.5)
    tokenizer.train()
    assert not torch.equal(tokenizer(packed).values_TD, tokenizer(packed).values_TD)
    state = torch.get_rng_state()
    again = tokenizer.targets(packed)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.values_TX.nan_to_num(), targets.values_TX.nan_to_num())


@pytest.mark.parametrize("kind", CASES)
def test_targets_of_kept_tokens_are_found_by_their_source(kind: str) -> None:
    tokenizer, packed, targets = targets_of(kind, dropout=0.5)
    whole = tokenizer.eval()(packed)
    kept = tokenizer.train()(packed)
    assert kept.source_T is not None
    assert torch.equal(whole.row_T[kept.source_T], kept.row_T)
    assert torch.equal(whole.values_TD[kept.source_T], kept.values_TD)
    assert whole.source_T is None and isinstance(targets, Targets)


def test_columns_of_a_table_by_hand() -> None:
    _, packed, targets = targets_of("tabular")
    shape = (len(packed), 3)
    assert torch.equal(targets.group_T.view(shape), torch.arange(3).expand(shape))
    assert torch.equal(targets.class_T.view(shape)[:, :2], torch.full((len(packed), 2), -1))
    cat = packed.fields["cat"][:, 0].long()
    assert torch.equal(targets.class_T.view(shape)[:, 2], torch.where(cat > 0, cat, -1))
    values = targets.values_TX.view(*shape, 2)
    assert torch.isnan(values[:, 0, 1]).all() and torch.isnan(values[:, 1, 0]).all() and torch.isnan(values[:, 2]).all()
    order = np.argsort(packed.fields["num"][:, 0].numpy(), kind="stable")
    assert (np.diff(values[:, 0, 0].numpy()[order]) >= 0).all(), "a quantile rises with the value"


def test_text_is_its_ids_and_pictures_have_no_level() -> None:
    _, packed, targets = targets_of("text")
    assert torch.equal(targets.class_T, packed.fields["data"].long())
    values = targets_of("image")[2].values_TX
    assert values.mean(1).abs().max() < 1e-4
