"""What stands in for a modality that a sample lacks: one token, only where the task knows the modality."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moemm.config.schema import MissingConfig, ModelConfig, RouterConfig, RouterLossConfig
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.models import Model, build_model
from moemm.models.missing import Bank, Predictor
from moemm.testing.modality_cases import fit_case, pack_values

KINDS = ("image", "timeseries", "tabular", "text")
SPECS = {fit_case(kind)[0].info.name: fit_case(kind) for kind in KINDS}
IMAGE, SERIES, TABLE, TEXT = SPECS
KNOWN = {"digits": (IMAGE, SERIES, TABLE), "age": (TABLE, TEXT)}


def make(kind: str, **model: Any) -> Model:
    tasks = [
        TaskInfo(
            name=name, file="x.h5", label="label", target="regression", outputs=1, metric="rmse", modalities=known,
            sizes={},
        )
        for name, known in KNOWN.items()
    ]  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig(dim=16, heads=2, missing=MissingConfig(kind=kind), **model)  # type: ignore[arg-type]
    return build_model(config, specs={name: spec for name, (spec, _) in SPECS.items()}, tasks=tasks)


def batch_of(*samples: tuple[str, tuple[str, ...]]) -> PackedBatch:
    """A batch of samples (task, modalities that it has)."""
    presence = torch.tensor([[name in have for name in SPECS] for _, have in samples])
    presence = presence.reshape(-1, len(SPECS)).bool()
    packed = {}
    for column, (name, (spec, values)) in enumerate(SPECS.items()):
        rows = presence[:, column].nonzero().flatten().tolist()
        packed[name] = pack_values(spec.info, [values[i % len(values)] for i in rows], rows)
    task = torch.tensor([list(KNOWN).index(name) for name, _ in samples], dtype=torch.int64)
    targets = {name: torch.ones(int((task == number).sum())) for number, name in enumerate(KNOWN)}
    index = torch.arange(len(samples))
    return PackedBatch(packed, presence, task, index, index, targets)


MIXED = (
    ("digits", KNOWN["digits"]),
    ("digits", (IMAGE,)),
    ("age", KNOWN["age"]),
    ("digits", (IMAGE, TABLE)),
    ("age", (TEXT,)),
)


def added(model: Model, batch: PackedBatch) -> list[tuple[int, str]]:
    """(sample, modality) of the tokens that were added."""
    plain, stream = make("none").tokenize(batch), model.tokenize(batch)
    assert stream.modality_T.tolist() == [m for m, length in enumerate(stream.lengths) for _ in range(length)]
    found = []
    for name, (before_TD, before_T), (values_TD, sample_T) in zip(SPECS, plain.split(), stream.split(), strict=True):
        own = len(before_T)
        assert torch.equal(values_TD[:own], before_TD) and torch.equal(sample_T[:own], before_T)
        found += [(sample, name) for sample in sample_T[own:].tolist()]
    return found


@pytest.mark.parametrize("kind", ["bank", "predict"])
def test_a_token_for_what_the_task_knows_and_the_sample_lacks(kind: str) -> None:
    model = make(kind).eval()
    assert added(model, batch_of(*MIXED)) == [(1, SERIES), (3, SERIES), (1, TABLE), (4, TABLE)], "age knows no image"


@pytest.mark.parametrize("kind", ["bank", "predict"])
def test_complete_samples_are_the_same_bit_for_bit(kind: str) -> None:
    plain, model = make("none").eval(), make(kind).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    batch = batch_of(*((task, known) for task, known in KNOWN.items() for _ in range(3)))
    for task, outputs in plain(batch).outputs.items():
        assert torch.equal(outputs, model(batch).outputs[task])
    mixed = batch_of(*MIXED)
    one, other = plain(mixed).outputs, model(mixed).outputs
    torch.testing.assert_close(one["digits"][0], other["digits"][0])
    assert not torch.allclose(one["digits"][1:], other["digits"][1:]), "and incomplete ones are not"


def test_the_bank_sums_over_what_is_there() -> None:
    model = make("bank").eval()
    bank = model.missing
    assert isinstance(bank, Bank)
    batch = batch_of(("digits", (IMAGE, TABLE)), ("digits", (TABLE,)))
    absent = bank.absent(batch)
    values_AD, loss = bank(absent, [model.tokenizers[n](p) for n, p in batch.modalities.items()], batch)
    rows = bank.rows
    assert loss is None
    assert list(zip(absent.sample_A.tolist(), absent.modality_A.tolist(), strict=True)) == [(1, 0), (0, 1), (1, 1)]
    expected = [rows[IMAGE][TABLE], rows[SERIES][IMAGE] + rows[SERIES][TABLE], rows[SERIES][TABLE]]  # type: ignore[index]
    torch.testing.assert_close(values_AD, torch.stack(expected))


def test_the_bank_has_a_row_for_each_ordered_pair_of_a_task() -> None:
    names = {name for name, _ in make("bank").named_parameters() if name.startswith("missing.")}
    pairs = {(o, m) for known in KNOWN.values() for o in known for m in known if o != m}
    assert names == {f"missing.rows.{m}.{o}" for o, m in pairs}, "image and text never meet"


def test_a_modality_that_is_absent_everywhere_is_stood_in_for() -> None:
    for kind in ("bank", "predict"):
        model = make(kind)
        batch = batch_of(("digits", (IMAGE,)), ("digits", (IMAGE, TABLE)))
        assert added(model.eval(), batch) == [(0, SERIES), (1, SERIES), (0, TABLE)]
        outputs = model.train()(batch).outputs
        assert all(torch.isfinite(value).all() for value in outputs.values())


@pytest.mark.parametrize("samples", [0, 5])
@pytest.mark.parametrize("kind", ["bank", "predict"])
def test_every_parameter_gets_a_gradient_in_one_order(kind: str, samples: int) -> None:
    orders = []
    for batch in (batch_of(*MIXED), batch_of(*MIXED[:samples]), batch_of(("age", (TEXT,)))):
        model, order = make(kind), []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
        output = model(batch)
        loss = sum((value**2).sum() for value in output.outputs.values())
        (loss + (0 if output.missing is None else output.missing)).backward()
        assert set(order) == {name for name, _ in model.named_parameters()}
        orders.append(order)
    assert orders[0] == orders[1] == orders[2]


def states_of(model: Model, batch: PackedBatch, name: str) -> torch.Tensor:
    """(n, D) mean of a modality's tokens, row by row."""
    tokens = model.tokenizers[name](batch.modalities[name])
    rows = range(len(batch.modalities[name]))
    return torch.stack([tokens.values_TD[tokens.row_T == row].mean(0) for row in rows])


def test_the_prediction_is_of_the_others_and_its_error_of_the_state() -> None:
    model = make("predict").train()
    predictor = model.missing
    assert isinstance(predictor, Predictor)
    batch = batch_of(("digits", (IMAGE, TABLE)), ("digits", (SERIES,)))
    image, table = states_of(model, batch, IMAGE)[0], states_of(model, batch, TABLE)[0]
    guess_image = predictor.decode[IMAGE](predictor.encode[TABLE](table))
    guess_table = predictor.decode[TABLE](predictor.encode[IMAGE](image))
    expected = ((guess_image - image) ** 2).mean() / 2 + ((guess_table - table) ** 2).mean() / 2
    loss = model(batch).missing
    torch.testing.assert_close(loss, expected)  # the second sample has nothing to be predicted from
    both = (predictor.encode[IMAGE](image) + predictor.encode[TABLE](table)) / 2
    parts = [model.tokenizers[name](packed) for name, packed in batch.modalities.items()]
    values_AD, _ = predictor(predictor.absent(batch), parts, batch)
    names = [list(SPECS)[m] for m in predictor.absent(batch).modality_A.tolist()]
    assert names == [IMAGE, SERIES, TABLE]
    torch.testing.assert_close(values_AD[1], predictor.decode[SERIES](both) + predictor.mark_D)
    assert model.eval()(batch).missing is None


def test_the_state_that_is_predicted_gets_no_gradient() -> None:
    model = make("predict").train()
    predictor = model.missing
    batch = batch_of(("digits", (IMAGE, TABLE)), ("digits", (IMAGE, SERIES)))
    parts = [model.tokenizers[name](packed) for name, packed in batch.modalities.items()]
    parts = [part._replace(values_TD=part.values_TD.detach().requires_grad_()) for part in parts]
    with torch.no_grad():  # with these the image is the only modality that is read, and all are predicted
        for name in (SERIES, TABLE, TEXT):
            predictor.encode[name][0].weight.zero_()
    _, loss = predictor(predictor.absent(batch), parts, batch)
    loss.backward()
    gradients = dict(zip(SPECS, (part.values_TD.grad for part in parts), strict=True))
    assert not gradients[SERIES].any() and not gradients[TABLE].any()
    assert gradients[IMAGE].any(), "what it is predicted from gets one"


def test_the_combination_is_that_of_what_the_sample_came_with() -> None:
    router = RouterConfig(kind="combination", losses=RouterLossConfig(combination=0.1))
    for kind in ("bank", "predict"):
        stream = make(kind, router=router).tokenize(batch_of(*MIXED))
        assert torch.equal(stream.presence_BM, batch_of(*MIXED).presence)


@pytest.mark.parametrize("kind", ["bank", "predict"])
def test_it_goes_with_the_other_ways_to_build_a_trunk(kind: str) -> None:
    options = {"untie": ["norms", "qkv"], "latents": 2, "ordered": True, "predict_every_block": True}
    model, batch = make(kind, **options), batch_of(*MIXED)
    stream = model.tokenize(batch)
    own = [2 * len(packed) for packed in batch.modalities.values()]
    assert stream.lengths == (own[0], own[1] + 2, own[2] + 2, own[3]), "two latents, or one token that stands in"
    output = model(batch)
    loss = sum((value**2).sum() for outputs in (output.outputs, *output.earlier) for value in outputs.values())
    (loss + (0 if output.missing is None else output.missing)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_samples_without_a_target_are_stood_in_for_too() -> None:
    model, batch = make("bank").eval(), batch_of(*MIXED)
    unlabelled = replace(batch, targets={name: torch.zeros(0) for name in KNOWN})
    assert added(model, unlabelled) == added(model, batch)


def test_a_modality_that_the_task_does_not_know_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="a modality that its task does not know"):
        make("bank")(batch_of(("age", (IMAGE, TABLE, TEXT))))


def test_no_part_of_it_counts_as_active() -> None:
    plain, bank = make("none").num_parameters(), make("bank").num_parameters()
    assert bank[0] > plain[0] and bank[1] == plain[1]
