"""What every modality must keep, whoever wrote it: runs over all registered kinds that testing has a case for."""

from __future__ import annotations

import json

import pytest
import torch

from moemm.config.schema import ModalityConfig
from moemm.errors import ConfigError
from moemm.modalities import KINDS, build_tokenizer, fit_modalities, specs_from_dict, specs_to_dict
from moemm.testing.modality_cases import fit_case, modality_cases, pack_values, with_nan

DIM = 16
CASES = sorted(modality_cases())


def built(kind: str, **options: object):
    spec, values = fit_case(kind, config=ModalityConfig(**options) if options else None)
    torch.manual_seed(0)
    return build_tokenizer(spec, DIM), spec, values


def test_every_registered_kind_has_a_case() -> None:
    assert set(CASES) == set(KINDS)


@pytest.mark.parametrize("kind", CASES)
def test_tokens_have_the_promised_shapes(kind: str) -> None:
    tokenizer, spec, values = built(kind)
    tokens = tokenizer(pack_values(spec.info, values))
    count = tokens.row_T.shape[0]
    assert tokens.values_TD.shape == (count, DIM)
    assert tokens.position_TP.shape == (count, 3)
    assert tokens.time_T.shape == (count,)
    assert torch.isfinite(tokens.values_TD).all()
    assert (tokens.row_T.diff() >= 0).all(), "the tokens of a row stand together, rows in order"
    assert tokens.row_T.unique().tolist() == list(range(len(values))), "every row has a token"


@pytest.mark.parametrize("kind", CASES)
def test_a_row_does_not_depend_on_its_neighbours(kind: str) -> None:
    tokenizer, spec, values = built(kind)
    tokenizer.eval()
    together = tokenizer(pack_values(spec.info, values))
    for row in (0, 7, 15):
        alone = tokenizer(pack_values(spec.info, values[row : row + 1]))
        torch.testing.assert_close(alone.values_TD, together.values_TD[together.row_T == row])
        torch.testing.assert_close(alone.position_TP, together.position_TP[together.row_T == row])
        torch.testing.assert_close(alone.time_T, together.time_T[together.row_T == row], equal_nan=True)


@pytest.mark.parametrize("kind", CASES)
def test_no_rows_give_no_tokens_and_a_zero_gradient_for_every_parameter(kind: str) -> None:
    tokenizer, spec, _ = built(kind)
    tokens = tokenizer(pack_values(spec.info, []))
    assert tokens.values_TD.shape == (0, DIM) and tokens.row_T.shape == (0,)
    tokens.values_TD.sum().backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient: ZeRO would mix up the ranks"
        assert parameter.numel() and not parameter.grad.any(), "ZeRO-3 cannot gather a parameter without elements"


@pytest.mark.parametrize("kind", CASES)
def test_gradients_reach_every_parameter(kind: str) -> None:
    tokenizer, spec, values = built(kind)
    tokens = tokenizer(with_nan(pack_values(spec.info, values)))
    (tokens.values_TD * torch.randn(tokens.values_TD.shape)).sum().backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("kind", [kind for kind in CASES if kind not in ("image", "text")])
def test_missing_numbers_change_something_and_break_nothing(kind: str) -> None:
    tokenizer, spec, values = built(kind)
    packed = pack_values(spec.info, values)
    clean, holed = tokenizer(packed).values_TD, tokenizer(with_nan(packed)).values_TD
    assert torch.isfinite(holed).all()
    assert not torch.equal(clean[0], holed[0])
    torch.testing.assert_close(clean[-1], holed[-1])


@pytest.mark.parametrize("kind", CASES)
def test_bf16(kind: str) -> None:
    tokenizer, spec, values = built(kind)
    exact = tokenizer(pack_values(spec.info, values)).values_TD
    half = tokenizer.to(torch.bfloat16)(pack_values(spec.info, values)).values_TD
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.08, rtol=0.08)


@pytest.mark.parametrize("kind", CASES)
def test_spec_and_weights_survive_json_and_state_dict(kind: str) -> None:
    tokenizer, spec, values = built(kind)
    again = specs_from_dict(json.loads(json.dumps(specs_to_dict({"x": spec}))))["x"]
    torch.manual_seed(1)
    other = build_tokenizer(again, DIM)
    other.load_state_dict(tokenizer.state_dict())
    packed = pack_values(spec.info, values)
    assert torch.equal(tokenizer.eval()(packed).values_TD, other.eval()(packed).values_TD)


@pytest.mark.parametrize("kind", CASES)
def test_token_dropout_keeps_a_token_of_each_row_and_only_trains(kind: str) -> None:
    tokenizer, spec, values = built(kind, dropout=0.9)
    packed = pack_values(spec.info, values)
    kept = tokenizer.train()(packed)
    every = tokenizer.eval()(packed)
    assert kept.row_T.unique().tolist() == list(range(len(values)))
    assert every.row_T.shape[0] == built(kind)[0](packed).row_T.shape[0]
    if every.row_T.shape[0] > len(values):
        assert kept.row_T.shape[0] < every.row_T.shape[0]


@pytest.mark.parametrize("kind", CASES)
def test_an_option_of_another_kind_is_refused(kind: str) -> None:
    info, _ = modality_cases()[kind]
    foreign = ModalityConfig(patch=[2]) if kind in ("text", "tabular") else ModalityConfig(vocab_size=300)
    with pytest.raises(ConfigError, match=f"modalities.{info.name}.*has no such option"):
        fit_modalities([info], {info.name: foreign}, lambda _: [])


def test_a_modality_that_the_run_lacks_is_refused() -> None:
    info, _ = modality_cases()["image"]
    with pytest.raises(ConfigError, match="no modality of that name; it has image"):
        fit_modalities([info], {"radar": ModalityConfig()}, lambda _: [])
