"""Objectives without labels, one by one and together, on the tiny data."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moemm.config.schema import Config, ContrastiveConfig, MaskedConfig, ObjectivesConfig
from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.modalities import Targets, TargetShape, fit_modalities, prepare_functions
from moemm.models import Model, build_model
from moemm.models.stream import join
from moemm.objectives import OBJECTIVES, LabelFree, build_pretext, register_objective
from moemm.objectives.content import Content, mean_over_samples
from moemm.objectives.contrastive import PairLoss
from moemm.objectives.draws import MASK, combine, uniform
from moemm.objectives.masked import token_loss
from moemm.objectives.replaced import exchange
from moemm.testing.tiny import tiny_config
from moemm.train.setup import train_values

NAMES = tuple(OBJECTIVES)


class Tiny:
    """The tiny data, a model with the given objectives, and batches."""

    def __init__(self, folder: Path, objectives: ObjectivesConfig, *, seed: int = 0, **model: Any):
        self.config: Config = tiny_config(folder, model=model).config
        self.catalogue = build_catalogue(self.config.data, base=folder)
        specs = fit_modalities(self.catalogue.modalities, {}, lambda name: train_values(self.catalogue, name))
        torch.manual_seed(seed)
        self.model: Model = build_model(self.config.model, specs=specs, tasks=self.catalogue.tasks)
        tokenizers: dict[str, Any] = dict(self.model.tokenizers.items())
        self.pretext = build_pretext(objectives, tokenizers, self.catalogue.tasks, 16, seed=seed)
        self.model.pretext = self.pretext
        self.model.train()
        self._packer = Packer(self.catalogue, prepare_functions(specs))

    def batch(self, *tasks: str, number: int = 6) -> PackedBatch:
        sets = [SplitDataset(self.catalogue, task=task, split="train") for task in tasks]
        return self._packer([one[i] for one in sets for i in range(number)])

    def content(self, batch: PackedBatch, *, step: int = 0) -> Content:
        tokens = [self.model.tokenizers[name](packed) for name, packed in batch.modalities.items()]
        tokenizers: Any = self.model.tokenizers
        return Content.make(tokens, join(tokens, batch), batch, tokenizers, seed=0, step=step)


def objectives(*names: str, supervised: float = 1.0, **sections: dict[str, Any]) -> ObjectivesConfig:
    config = ObjectivesConfig()
    config.supervised.weight = supervised
    for name in names:
        setattr(config, name, dataclasses.replace(getattr(config, name), weight=1.0, **sections.get(name, {})))
    return config


@pytest.fixture
def tiny(tmp_path: Path) -> Any:
    return lambda *names, model=None, **options: Tiny(tmp_path, objectives(*names, **options), **(model or {}))


def modules_with_gradient(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_parameters() if one.grad is not None and bool(one.grad.any())}


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_reaches_the_trunk_the_tokenizers_and_its_own_heads(tiny: Any, name: str) -> None:
    made = tiny(name)
    loss, count = made.model(made.batch("shapes", "tones")).pretext[name]
    assert loss.requires_grad and torch.isfinite(loss) and loss > 0, "a detached auxiliary loss trains nothing"
    assert count > 0
    loss.backward()
    reached = modules_with_gradient(made.model)
    modalities = ("image", "record") if name == "contrastive" else ("image", "record", "series")
    wanted = {f"tokenizers.{one}" for one in modalities} | {"trunk.blocks.0.attention", f"pretext.objectives.{name}"}
    assert all(any(one.startswith(part) for one in reached) for part in wanted)
    assert not any(one.startswith("heads.linear") for one in reached)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_an_objective_does_not_concern_gives_zero_with_a_gradient_everywhere(tiny: Any, name: str) -> None:
    made = tiny(name)
    made.pretext.config.masked.ratio = made.pretext.config.replaced.ratio = 0.0
    batch = made.batch("tones", number=0 if name == "replaced" else 3)
    output = made.model(batch)
    loss, count = output.pretext[name]
    assert loss.item() == 0.0 and count.item() == 0.0, "a mask without an element is no 0/0"
    (loss + sum(out.sum() for out in output.outputs.values())).backward()
    lacking = [one for one, parameter in made.model.named_parameters() if parameter.grad is None]
    assert not [one for one in lacking if not one.startswith("trunk.")], "ZeRO would mix up the ranks"
    assert all(torch.isfinite(p.grad).all() for p in made.model.parameters() if p.grad is not None)


def test_all_parameters_of_the_objectives_are_registered(tiny: Any) -> None:
    made = tiny(*NAMES)
    assert isinstance(made.pretext, LabelFree)
    names = {name for name, _ in made.model.named_parameters() if name.startswith("pretext.")}
    for part in ("mask.embedding.image", *(f"objectives.{name}" for name in NAMES)):
        assert any(name.startswith(f"pretext.{part}") for name in names), "parameters in plain lists are never trained"
    decoders = {name.split(".")[4] for name in names if name.startswith("pretext.objectives.masked.decoders")}
    assert decoders == {"image", "record", "series"}


@pytest.mark.parametrize("model", [{}, {"untie": ["norms", "qkv"], "predict_every_block": True}, {"ordered": True}])
def test_a_model_without_them_has_the_same_weights_and_forward_pass(tiny: Any, model: dict[str, Any]) -> None:
    plain, with_all = tiny(model=model), tiny(*NAMES, model=model)
    assert plain.pretext is None
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, with_all.model.state_dict()[name]), name
    batch = plain.batch("shapes", "tones")
    first, second = (one.model(batch) for one in (plain, with_all))
    assert len(first.earlier) == len(second.earlier)
    for left, right in zip([first.outputs, *first.earlier], [second.outputs, *second.earlier], strict=True):
        for name in left:
            torch.testing.assert_close(left[name], right[name])
    outputs = first.outputs
    others = with_all.model.eval()(batch)
    assert others.pretext == {} and all(torch.equal(outputs[name], others.outputs[name]) for name in outputs)


def test_only_hidden_tokens_are_in_the_masked_loss(tiny: Any) -> None:
    made = tiny("masked", supervised=0.0)
    batch = made.batch("shapes")
    content = made.content(batch)
    hidden_T = made.pretext.mask.hidden(content)
    before = made.model(batch).pretext["masked"][0]
    real = Content.make.__func__

    def spoilt(*arguments: Any, **options: Any) -> Content:
        found = real(Content, *arguments, **options)
        for name, span in found.spans.items():
            found.targets[name].values_TX[~hidden_T[span]] = 1e3
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Content, "make", spoilt)
        assert torch.equal(made.model(batch).pretext["masked"][0], before), "what can be seen is no label"


def test_a_hidden_token_is_not_seen(tiny: Any) -> None:
    made = tiny("masked", supervised=0.0)
    batch = made.batch("tones")
    other = copy.deepcopy(batch)
    content = made.content(batch)
    hidden_T = made.pretext.mask.hidden(content)
    frames = torch.arange(batch.modalities["series"].fields["data"].shape[0])
    patch = made.model.tokenizers["series"].patch
    lengths = batch.modalities["series"].lengths
    assert lengths is not None
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    step = frames - (lengths.cumsum(0) - lengths)[row]
    first = (((lengths + patch - 1) // patch).cumsum(0) - (lengths + patch - 1) // patch)[row]
    other.modalities["series"].fields["data"][hidden_T[first + step // patch]] += 5.0
    assert hidden_T.any() and not hidden_T.all()
    values = [made.pretext.mask(made.content(one), hidden_T) for one in (batch, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(made.content(batch).stream.values_TD, made.content(other).stream.values_TD)


def test_what_is_hidden_depends_on_step_and_sample_and_on_nothing_else(tiny: Any) -> None:
    made = tiny("masked", masked={"cross_modal": 0.5, "ratio": 0.5})
    whole, half = made.batch("shapes"), made.batch("shapes", number=3)
    hidden_T = made.pretext.mask.hidden(made.content(whole))
    torch.manual_seed(123)
    assert torch.equal(hidden_T, made.pretext.mask.hidden(made.content(whole)))
    content, part = made.content(whole), made.content(half)
    first_T = content.stream.sample_T < 3
    assert torch.equal(hidden_T[first_T], made.pretext.mask.hidden(part))
    assert not torch.equal(hidden_T, made.pretext.mask.hidden(made.content(whole, step=1)))


def test_cross_modal_hides_one_whole_modality_and_leaves_the_others(tiny: Any) -> None:
    made = tiny("masked", masked={"cross_modal": 1.0})
    content = made.content(made.batch("shapes", "tones"))
    hidden_T, stream = made.pretext.mask.hidden(content), content.stream
    several = 0
    for sample in range(stream.num_samples):
        hidden = [
            hidden_T[(stream.sample_T == sample) & (stream.modality_T == m)]
            for m in range(3)
            if content.present_BM[sample, m]
        ]
        if len(hidden) > 1:
            several += 1
            assert sorted((part.all().item(), part.any().item()) for part in hidden) == [(False, False), (True, True)]
    assert several > 0


def test_modalities_that_are_not_named_are_left_alone(tiny: Any) -> None:
    made = tiny("masked", masked={"modalities": ["series"], "ratio": 1.0})
    content = made.content(made.batch("shapes", "tones"))
    hidden_T = made.pretext.mask.hidden(content)
    assert torch.equal(hidden_T, content.stream.modality_T == 2)
    with pytest.raises(ConfigError, match=r"masked\.modalities: sound cannot be hidden: this run has no such modality"):
        tiny("masked", masked={"modalities": ["sound"]})


def test_draws_are_uniform() -> None:
    keys = combine(torch.arange(20_000), 7)
    assert keys.unique().numel() == keys.numel()
    draws = uniform(keys, MASK)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    shares = torch.histc(draws, bins=10, min=0.0, max=1.0) / keys.numel()
    assert (shares - 0.1).abs().max() < 0.01
    assert abs(torch.corrcoef(torch.stack([draws, uniform(keys, MASK + 1)]))[0, 1]) < 0.03


def test_a_sample_counts_the_same_whatever_its_length() -> None:
    loss_T = torch.tensor([1.0, 3.0, 10.0, 5.0], requires_grad=True)
    total, count = mean_over_samples(loss_T, torch.tensor([0, 0, 1, 4]), (3, 2))
    assert total.item() == (2.0 + 10.0) / 2 + 5.0 and count.item() == 2.0
    empty, none = mean_over_samples(loss_T[:0], torch.tensor([], dtype=torch.int64), (3, 2))
    empty.backward()
    assert empty.item() == 0.0 and none.item() == 0.0 and loss_T.grad is not None


def test_token_loss_is_one_for_who_knows_nothing_and_skips_what_is_missing() -> None:
    torch.manual_seed(0)
    values_TX = torch.randn(500, 3)
    values_TX[0] = float("nan")
    values_TX[1, :2] = float("nan")
    targets = Targets(values_TX, torch.full((500,), -1), torch.zeros(500, dtype=torch.int64))
    out_TX = torch.zeros(500, 3 + 7, requires_grad=True)
    loss_T, known_T = token_loss(out_TX, targets, TargetShape(values=3, classes=7))
    assert known_T.tolist() == [False] + [True] * 499
    assert loss_T[known_T].mean().item() == pytest.approx(1.0, abs=0.1)
    assert loss_T[1].item() == pytest.approx(values_TX[1, 2].item() ** 2)
    classes = Targets(torch.full((4, 3), float("nan")), torch.tensor([0, 3, 6, 2]), torch.zeros(4, dtype=torch.int64))
    loss_T, known_T = token_loss(out_TX[:4], classes, TargetShape(values=3, classes=7))
    assert known_T.all()
    torch.testing.assert_close(loss_T, torch.ones(4))
    loss_T.sum().backward()
    assert torch.isfinite(out_TX.grad).all(), "NaN times 0 is NaN"


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_pair_losses_against_plain_arithmetic(kind: Any) -> None:
    torch.manual_seed(0)
    cosine_nn = torch.rand(5, 5)
    loss = PairLoss(ContrastiveConfig(loss=kind, temperature=0.2))
    (found,), reach = loss([cosine_nn], [torch.eye(5, dtype=torch.bool)])
    logits = (cosine_nn * 5.0 - (10.0 if kind == "siglip" else 0.0)).double()
    for i in range(5):
        if kind == "infonce":
            rows = math.log(sum(math.exp(value) for value in logits[i])) - logits[i, i]
            columns = math.log(sum(math.exp(value) for value in logits[:, i])) - logits[i, i]
        else:

            def one(value: float, sign: float) -> float:
                return math.log1p(math.exp(-sign * value))

            rows = sum(one(logits[i, j].item(), 1.0 if i == j else -1.0) for j in range(5))
            columns = sum(one(logits[j, i].item(), 1.0 if i == j else -1.0) for j in range(5))
        assert found[i].item() == pytest.approx(float(rows + columns) / 2, rel=1e-5)
    assert reach.item() == 0.0 and reach.requires_grad


def test_modalities_are_aligned_without_seeing_each_other(tiny: Any) -> None:
    made = tiny("contrastive", supervised=0.0)
    batch, other = made.batch("shapes"), made.batch("shapes")
    other.modalities["record"].fields["num"] += 1.0
    seen = []
    made.pretext.objectives["contrastive"].project["image"].register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach())
    )
    losses = [made.model(one).pretext["contrastive"][0] for one in (batch, other)]
    assert torch.equal(seen[0], seen[1]), "attention would show each modality the answer"
    assert not torch.equal(losses[0], losses[1])


def test_alignment_alone_passes_no_whole_sample_through_the_trunk(tiny: Any) -> None:
    unlabelled, labelled = (tiny("contrastive", supervised=weight) for weight in (0.0, 1.0))
    batch = unlabelled.batch("shapes", "tones")
    found, whole = (made.model(batch) for made in (unlabelled, labelled))
    tokens = unlabelled.content(batch).stream
    together = int((unlabelled.content(batch).present_BM.sum(1) > 1)[tokens.sample_T].sum())
    assert found.num_tokens == together < len(tokens.sample_T), "of samples that have something to align"
    assert whole.num_tokens == together + len(tokens.sample_T)
    torch.testing.assert_close(found.pretext["contrastive"], whole.pretext["contrastive"])


def test_pairs_that_no_task_has_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="no task has samples with image and series"):
        tiny("contrastive", contrastive={"pairs": [["image", "series"]]})
    with pytest.raises(ConfigError, match="no modality sound"):
        tiny("contrastive", contrastive={"pairs": [["image", "sound"]]})
    made = tiny("contrastive", contrastive={"pairs": [["record", "image"]]})
    assert made.pretext.objectives["contrastive"].pairs == [(1, 0)]


def test_exchanged_tokens_come_from_the_same_modality_and_column(tiny: Any) -> None:
    made = tiny("replaced", replaced={"ratio": 0.5})
    content = made.content(made.batch("shapes", "tones"))
    values_TD, changed_T = exchange(content, 0.5)
    before_TD = content.stream.values_TD
    assert changed_T.any() and not changed_T.all()
    assert torch.equal(values_TD[~changed_T], before_TD[~changed_T])
    for token in changed_T.nonzero().flatten().tolist():
        donors = (before_TD == values_TD[token]).all(1).nonzero().flatten().tolist()
        assert any(
            content.stream.modality_T[d] == content.stream.modality_T[token]
            and content.group_T[d] == content.group_T[token]
            for d in donors
        )


def test_a_name_is_registered_once() -> None:
    assert register_objective("masked")(OBJECTIVES["masked"]) is OBJECTIVES["masked"]
    with pytest.raises(ConfigError, match="objective 'masked' is registered by both"):
        register_objective("masked")(OBJECTIVES["replaced"])


def test_masked_losses_go_down(tiny: Any) -> None:
    made = tiny(*NAMES, supervised=0.0)
    batch = made.batch("shapes", "tones", number=16)
    optimizer = torch.optim.AdamW(made.model.parameters(), lr=1e-2)
    history = []
    for step in range(60):
        made.pretext.step = step
        losses = made.model(batch).pretext
        history.append({name: (loss / count).item() for name, (loss, count) in losses.items()})
        optimizer.zero_grad()
        sum(loss / count for loss, count in losses.values()).backward()
        optimizer.step()
    for name in NAMES:
        first, last = (sum(one[name] for one in part) / 10 for part in (history[:10], history[-10:]))
        assert last < 0.93 * first, name


def test_a_kind_without_targets_is_not_hidden() -> None:
    from moemm.objectives.masking import wanted

    shapes = {"image": TargetShape(values=4), "odd": None}
    assert list(wanted(MaskedConfig(), shapes)) == ["image"]
