"""Options of the trunk: parts of each modality's own, latents, an order, a prediction after every block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_models import make

from moemm.config.schema import ModelConfig, RouterConfig
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.models.untied import ByGroup, share_groups
from moemm.moe import RouterStats

SMALL = ModelConfig(dim=16, heads=2)
OPTIONS = {
    "untied norms": replace(SMALL, untie=["norms"]),
    "untied qkv": replace(SMALL, untie=["qkv"]),
    "shared by two": replace(SMALL, untie=["norms", "qkv"], share=[["image", "text"]]),
    "latents": replace(SMALL, latents=3),
    "shared latents": replace(SMALL, latents=3, share=[["image", "series"]]),
    "ordered": replace(SMALL, ordered=True),
    "every block": replace(SMALL, predict_every_block=True),
}


def without(batch: PackedBatch, number: int) -> PackedBatch:
    """The batch with no row of one modality."""
    name = list(batch.modalities)[number]
    packed = batch.modalities[name]
    empty = {key: value[:0] for key, value in packed.fields.items()}
    lengths = None if packed.lengths is None else packed.lengths[:0]
    modalities = {**batch.modalities, name: replace(packed, fields=empty, lengths=lengths, sample=packed.sample[:0])}
    presence = batch.presence.clone()
    presence[:, number] = False
    return replace(batch, modalities=modalities, presence=presence)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_parameter_has_a_gradient_also_where_a_modality_is_absent(name: str) -> None:
    model, batch = make(OPTIONS[name])
    for given in (batch, without(batch, 1)):
        model.zero_grad()
        output = model(given)
        every = [output.outputs, *output.earlier]
        sum(out.sum() for outputs in every for out in outputs.values()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), name
        assert all(torch.isfinite(out).all() for outputs in every for out in outputs.values())


def test_parts_of_ones_own_are_applied_to_ones_own_tokens() -> None:
    torch.manual_seed(0)
    module = ByGroup(("a_c", "b", "a_c"), lambda: torch.nn.Linear(4, 3))
    x_TD = torch.randn(9, 4)
    out = module(x_TD, (2, 4, 3))
    torch.testing.assert_close(out[:2], module.members["a_c"](x_TD[:2]))
    torch.testing.assert_close(out[2:6], module.members["b"](x_TD[2:6]))
    torch.testing.assert_close(out[6:], module.members["a_c"](x_TD[6:]))
    assert module(x_TD[:0], (0, 0, 0)).shape == (0, 3)


def test_share_names_the_groups_and_refuses_strangers() -> None:
    assert share_groups(("a", "b", "c"), [["c", "a"]]) == ("c_a", "b", "c_a")
    with pytest.raises(ConfigError, match=r"model\.share names radar; this run has a, b"):
        share_groups(("a", "b"), [["a", "radar"]])


def test_latents_stand_for_the_tokens_of_each_row() -> None:
    model, batch = make(OPTIONS["latents"])
    stream = model.tokenize(batch)
    rows = [len(packed) for packed in batch.modalities.values()]
    assert stream.lengths == tuple(3 * number for number in rows) and stream.values_TD.shape[0] == 3 * sum(rows)
    for number, packed in enumerate(batch.modalities.values()):
        own = stream.sample_T[stream.modality_T == number]
        assert own.tolist() == packed.sample.repeat_interleave(3).tolist(), "a sample without it has no latents of it"


def test_latents_see_their_own_row_alone() -> None:
    model, batch = make(OPTIONS["latents"])
    before = model.tokenize(batch)
    packed = batch.modalities["image"]
    packed.fields["data"][0] += 1
    after = model.tokenize(batch)
    changed = (before.values_TD != after.values_TD).any(1)
    image = before.modality_T == list(batch.modalities).index("image")
    assert torch.equal(changed, image & (before.sample_T == packed.sample[0]))


def test_in_order_a_token_sees_no_later_modality() -> None:
    model, batch = make(OPTIONS["ordered"])
    model.eval()
    stream = model.tokenize(batch)
    (before,), *_ = model.trunk(stream)
    last = stream.modality_T == 3
    stream.values_TD = stream.values_TD + last[:, None] * torch.randn_like(stream.values_TD)
    (after,), *_ = model.trunk(stream)
    assert torch.equal(before[~last], after[~last]) and not torch.equal(before[last], after[last])
    stream.values_TD = stream.values_TD + (stream.modality_T == 0)[:, None] * torch.randn_like(stream.values_TD)
    (moved,), *_ = model.trunk(stream)
    with_first = torch.isin(stream.sample_T, stream.sample_T[stream.modality_T == 0])
    assert (moved != after)[last & with_first].any(1).all(), "later tokens see the first modality"


def test_a_prediction_after_every_block() -> None:
    model, batch = make(replace(OPTIONS["every block"], layers=3))
    plain, _ = make(replace(SMALL, layers=3))
    plain.load_state_dict(model.state_dict())
    output = model(batch)
    assert len(output.earlier) == 2
    for name, value in plain(batch).outputs.items():
        torch.testing.assert_close(output.outputs[name], value)
        assert not torch.equal(output.earlier[0][name], value)


def test_active_parameters_count_ones_own_parts() -> None:
    model, _ = make(OPTIONS["untied qkv"])
    tied, _ = make(SMALL)
    assert model.num_parameters()[0] > tied.num_parameters()[0]
    assert model.num_parameters()[1] == tied.num_parameters()[1]
    many, _ = make(OPTIONS["latents"])
    one, _ = make(replace(OPTIONS["latents"], share=[["image", "series", "record", "text"]]))
    assert many.num_parameters()[1] == one.num_parameters()[1] < one.num_parameters()[0] < many.num_parameters()[0]


def kept_and_gradients(recompute: bool, *, train: bool = True) -> tuple[int, int, list[torch.Tensor], RouterStats]:
    """Elements that the forward pass keeps for the backward pass, calls of blocks, gradients, the routers' sums."""
    router = RouterConfig(kind="noisy")
    model, batch = make(replace(SMALL, predict_every_block=True, dropout=0.5, router=router))
    model.train(train)
    model.trunk.recompute = recompute
    calls, kept = [], [0]
    for block in model.trunk.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[0] += tensor.numel()
        return tensor

    torch.manual_seed(7)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch)
    assert output.router is not None
    losses = [out.sum() for outputs in (output.outputs, *output.earlier) for out in outputs.values()]
    (sum(losses) + sum(part.sum() for part in output.router.parts)).backward()
    return kept[0], len(calls), [p.grad for p in model.parameters() if p.grad is not None], output.router


def test_a_block_that_is_computed_again_keeps_less_and_gives_the_same_gradients() -> None:
    more, once, wanted, stats = kept_and_gradients(False)
    less, twice, found, stats_again = kept_and_gradients(True)
    assert (once, twice) == (2, 4) and less < 0.5 * more
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), "dropout and the router's noise, too"
    assert all(map(torch.equal, stats_again.parts, stats.parts)), "counted once"


def test_nothing_is_computed_again_outside_of_training() -> None:
    assert kept_and_gradients(True, train=False)[:2] == kept_and_gradients(False, train=False)[:2]
