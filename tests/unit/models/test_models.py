"""The model: packed attention against one sample at a time, samples that do not see each other, absent modalities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moemm.config.schema import ExpertGroupConfig, ExpertsConfig, ModelConfig, RouterConfig
from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.models import Model, build_model
from moemm.models.attention import Attention, AttentionPlan
from moemm.models.heads import Heads, Pool
from moemm.models.position import FourierPosition
from moemm.models.trunk import active_width
from moemm.moe import ExpertMap
from moemm.objectives import supervised_losses
from moemm.testing.modality_cases import fit_case, modality_cases, pack_values

KINDS = ("image", "timeseries", "tabular", "text")


def make(config: ModelConfig | None = None, samples: int = 6) -> tuple[Model, PackedBatch]:
    """A model over four modalities and two tasks, and a batch in which sample i lacks modality i % 4."""
    cases = {kind: fit_case(kind) for kind in KINDS}
    specs = {spec.info.name: spec for spec, _ in cases.values()}
    common = {"file": "x.h5", "label": "label", "modalities": tuple(specs), "sizes": {}}
    tasks = [
        TaskInfo(name="digits", target="classification", outputs=5, metric="accuracy", **common),
        TaskInfo(name="age", target="regression", outputs=1, metric="rmse", **common),
    ]
    torch.manual_seed(0)
    model = build_model(config or ModelConfig(dim=16, heads=2), specs=specs, tasks=tasks)
    packed, presence = {}, torch.zeros(samples, len(KINDS), dtype=torch.bool)
    for number, (spec, values) in enumerate(cases.values()):
        rows = [i for i in range(samples) if i % len(KINDS) != number]
        presence[rows, number] = True
        packed[spec.info.name] = pack_values(spec.info, [values[i] for i in rows], rows)
    task = torch.arange(samples) % 2
    targets = {"digits": torch.ones(int((task == 0).sum()), dtype=torch.int64), "age": torch.ones(int(task.sum()))}
    index = torch.arange(samples)
    return model, PackedBatch(packed, presence, task, index, index, targets)


@pytest.mark.parametrize("backend", ["padded", "nested"])
def test_packed_attention_equals_one_sample_at_a_time(backend: str) -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, num_layers=1)
    lengths = [3, 1, 40, 0, 3, 12, 13]
    sample_T = torch.repeat_interleave(torch.arange(7), torch.tensor(lengths))
    sample_T = sample_T[torch.randperm(len(sample_T))]
    x_TD = torch.randn(len(sample_T), 16, requires_grad=True)
    plan = AttentionPlan.make(sample_T, num_samples=7, backend=backend)
    out_TD = attention(x_TD, plan)
    expected = torch.zeros_like(out_TD)
    for sample in range(7):
        rows = sample_T == sample
        if rows.any():
            query, key, value = attention.qkv(x_TD[rows]).view(-1, 3, 2, 8).permute(1, 2, 0, 3)
            query, key = attention.query_norm(query), attention.key_norm(key)
            seen = F.softmax(query @ key.transpose(-1, -2) * 8**-0.5, -1) @ value
            expected[rows] = attention.out(seen.transpose(0, 1).flatten(1))
    torch.testing.assert_close(out_TD, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(out_TD)
    fast, plain = (torch.autograd.grad((o * weight).sum(), x_TD, retain_graph=True)[0] for o in (out_TD, expected))
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_an_infinite_token_stays_in_its_sample() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, num_layers=1)
    sample_T = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 5, 4, 6]))
    x_TD = torch.randn(len(sample_T), 16)
    plan = AttentionPlan.make(sample_T, num_samples=4, backend="padded")
    clean_TD = attention(x_TD, plan)
    x_TD[sample_T == 2] = float("inf")
    others = sample_T != 2
    torch.testing.assert_close(attention(x_TD, plan)[others], clean_TD[others])


def test_no_tokens_at_all_go_through_attention() -> None:
    attention = Attention(16, 2, num_layers=1)
    for backend in ("padded", "nested"):
        plan = AttentionPlan.make(torch.zeros(0, dtype=torch.int64), num_samples=3, backend=backend)
        out = attention(torch.zeros(0, 16), plan)
        assert out.shape == (0, 16)
        out.sum().backward()
        assert attention.qkv.weight.grad is not None


@pytest.mark.parametrize("moe", ["sparse", "dense"])
def test_samples_do_not_see_each_other(moe: str) -> None:
    model, batch = make(ModelConfig(dim=16, heads=2, moe=moe))
    model.eval()
    whole = model(batch).outputs
    changed = {name: packed.map(lambda t: t) for name, packed in batch.modalities.items()}
    image = changed["image"]
    pixels = image.fields["data"].clone()
    pixels[image.sample == 2] = 255 - pixels[image.sample == 2]
    changed["image"] = replace(image, fields={"data": pixels})
    other = model(replace(batch, modalities=changed)).outputs
    torch.testing.assert_close(whole["digits"][[0, 2]], other["digits"][[0, 2]])
    assert not torch.allclose(whole["digits"][1], other["digits"][1]), "sample 2 is the second of the first task"
    torch.testing.assert_close(whole["age"], other["age"])


def test_outputs_and_a_gradient_for_every_parameter_whatever_is_absent() -> None:
    model, batch = make()
    names = list(model.tokenizers)
    order = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    seen = []
    for absent in (None, *names):
        packed = dict(batch.modalities)
        if absent is not None:
            packed[absent] = pack_values(modality_cases()[model.tokenizers[absent].spec.kind][0], [], [])
        model.zero_grad()
        order.clear()
        output = model(replace(batch, modalities=packed))
        losses = supervised_losses(output.outputs, batch.targets, model.tasks)
        sum(losses.values()).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        seen.append(tuple(order))
    assert len(set(seen)) == 1, "gradients arrive in one order, whichever modality is absent"


def test_a_task_without_samples_gives_zero_rows_and_zero_loss() -> None:
    model, batch = make()
    alone = replace(
        batch, task=torch.zeros_like(batch.task), targets={"digits": torch.ones(6).long(), "age": torch.zeros(0)}
    )
    output = model(alone)
    assert output.outputs["age"].shape == (0, 1) and output.outputs["digits"].shape == (6, 5)
    losses = supervised_losses(output.outputs, alone.targets, model.tasks)
    assert losses["age"].item() == 0.0 and losses["age"].requires_grad


def test_a_batch_of_another_catalogue_is_an_invariant_broken() -> None:
    model, batch = make()
    packed = dict(reversed(batch.modalities.items()))
    with pytest.raises(AssertionError, match="another catalogue"):
        model(replace(batch, modalities=packed))


WIDTHS = ExpertsConfig(
    groups=[
        ExpertGroupConfig(kind="shared", width=32),
        ExpertGroupConfig(kind="modality", width=16),
        ExpertGroupConfig(kind="routed", count=4, width=8),
    ]
)


def test_dense_has_the_active_width_of_sparse() -> None:
    sparse = ModelConfig(experts=WIDTHS, router=RouterConfig(top_k=2))
    expert_map = ExpertMap.from_config(WIDTHS.groups, ["image", "text"])
    assert active_width(sparse, expert_map) == 32 + 16 + 16
    model_s, _ = make(replace(sparse, dim=16, heads=2))
    model_d, _ = make(replace(sparse, dim=16, heads=2, moe="dense"))
    (total_s, active_s), (total_d, active_d) = model_s.num_parameters(), model_d.num_parameters()
    router = sum(p.numel() for n, p in model_s.named_parameters() if "router" in n)
    assert active_s - router == active_d
    assert total_s > total_d
    assert total_d == sum(parameter.numel() for parameter in model_d.parameters())


def test_pool_is_a_softmax_over_the_tokens_of_each_sample() -> None:
    torch.manual_seed(0)
    pool = Pool(8, 2, tasks=["a", "c", "b"])
    for query in pool.query.values():
        torch.nn.init.normal_(query)
    sample_T = torch.tensor([0, 2, 0, 2, 2, 0])
    x_TD, task_B = torch.randn(6, 8), torch.tensor([1, 0, 2])
    pooled = pool(x_TD, sample_T, task_B)
    for sample in (0, 2):
        x = x_TD[sample_T == sample]
        query = pool.query["acb"[task_B[sample]]].view(2, 4)
        key, value = pool.key(x).view(-1, 2, 4), pool.value(x).view(-1, 2, 4)
        weight = torch.softmax((key * query).sum(-1) / 2.0, 0)
        expected = torch.cat([(weight[..., None] * value).sum(0).flatten(), x.mean(0)])
        torch.testing.assert_close(pooled[sample], expected)
    assert not pooled[1].any(), "no token, no signal"


def heads_of(*drawn_with: str | None) -> Heads:
    """Heads of tasks t0, t1 ... with 2, 3 ... classes, and dropout."""
    common = {"file": "x.h5", "label": "label", "modalities": (), "sizes": {}, "metric": "accuracy"}
    tasks = [
        TaskInfo(name=f"t{i}", target="classification", outputs=2 + i, drawn_with=first, **common)
        for i, first in enumerate(drawn_with)
    ]
    torch.manual_seed(0)
    heads = Heads(tasks, 8, 2, dropout=0.5)
    for query in heads.pool.query.values():
        torch.nn.init.normal_(query)
    return heads


def test_tasks_with_samples_of_their_own_take_one_pass_as_before() -> None:
    heads = heads_of(None, None)
    sample_T, x_TD, task_B = torch.tensor([0, 2, 0, 2, 1, 0]), torch.randn(6, 8), torch.tensor([1, 0, 1])
    torch.manual_seed(7)
    found = heads(x_TD, sample_T, task_B)
    torch.manual_seed(7)
    pooled = heads.dropout(heads.pool(x_TD, sample_T, task_B))
    assert heads.num_passes == 1 and not heads.state_dict().keys() & {"task_PN"}
    for number, (name, rows) in enumerate(found.items()):
        assert torch.equal(rows, heads.linear[name](pooled[task_B == number])), "to the bit"


def test_each_pass_pools_the_samples_with_such_a_task_from_its_own_stream() -> None:
    heads = heads_of(None, None, "t0", None, "t0").eval()
    assert heads.num_passes == 3
    sample_T, task_B = torch.tensor([0, 2, 0, 2, 1, 0, 3, 3]), torch.tensor([0, 1, 0, 3])
    streams = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    found = heads(streams, sample_T, task_B)
    assert list(found) == ["t0", "t1", "t2", "t3", "t4"]
    for name, place, samples in (
        ("t0", 0, [0, 2]),
        ("t1", 0, [1]),
        ("t2", 1, [0, 2]),
        ("t3", 0, [3]),
        ("t4", 2, [0, 2]),
    ):
        own_B = torch.full_like(task_B, int(name[1]))
        expected = heads.linear[name](heads.pool(streams[place], sample_T, own_B)[samples])
        torch.testing.assert_close(found[name], expected)
    of_third = torch.autograd.grad(found["t4"].sum(), streams, retain_graph=True, materialize_grads=True)
    assert [bool(grad.any()) for grad in of_third] == [False, False, True]
    assert not of_third[2][[1, 3], :].eq(0).all() and not of_third[2][[4, 6, 7]].any(), (
        "tokens of samples 0 and 2 alone"
    )
    with pytest.raises(AssertionError, match="2 streams for 3 passes"):
        heads(streams[:2], sample_T, task_B)


def test_a_pass_without_samples_still_gives_gradients_in_the_same_order() -> None:
    heads = heads_of(None, None, "t0")
    orders = []
    for task_B in ([0, 1, 0], [1, 1, 1], [0, 0, 0], [2, 1, 2], []):
        order: list[str] = []
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, order=order: order.append(name))
            for name, parameter in heads.named_parameters()
        ]
        sample_T = torch.tensor([0, 2, 0, 2, 1, 0][: 2 * len(task_B)], dtype=torch.int64)
        found = heads(torch.randn(len(sample_T), 8), sample_T, torch.tensor(task_B, dtype=torch.int64))
        torch.stack([rows.sum() for rows in found.values()]).sum().backward()
        assert sum(len(rows) for rows in found.values()) == len(task_B) + task_B.count(0)
        for handle in handles:
            handle.remove()
        orders.append(tuple(order))
    assert len(set(orders)) == 1 and len(orders[0]) == len(list(heads.parameters()))


def test_positions_know_order_place_and_time() -> None:
    torch.manual_seed(0)
    position = FourierPosition(16)
    base = position(torch.zeros(1, 3), torch.tensor([float("nan")]))
    for axis in range(3):
        moved = torch.zeros(1, 3)
        moved[0, axis] = 0.5
        assert not torch.allclose(position(moved, torch.tensor([float("nan")])), base)
    assert not torch.allclose(position(torch.zeros(1, 3), torch.tensor([0.0])), base), "time 0 is not unknown time"
    assert torch.isfinite(position(torch.full((1, 3), 500.0), torch.tensor([3600.0]))).all()


def test_constants_keep_their_precision_in_bf16() -> None:
    position = FourierPosition(16)
    exact = position.sequence_B.clone()
    position.bfloat16()
    assert position.project.weight.dtype == torch.bfloat16
    assert position.sequence_B.dtype == torch.float32 and torch.equal(position.sequence_B, exact)


def test_bf16_model_stays_near_fp32() -> None:
    model, batch = make()
    model.eval()
    exact = model(batch).outputs["digits"]
    half = model.bfloat16()(batch).outputs["digits"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.1)


def test_supervised_losses_are_sums() -> None:
    common = {"file": "x.h5", "label": "label", "modalities": (), "sizes": {}, "metric": "m"}
    tasks = [
        TaskInfo(name="a", target="classification", outputs=3, **common),
        TaskInfo(name="b", target="multilabel", outputs=4, **common),
        TaskInfo(name="c", target="regression", outputs=2, **common),
    ]
    generator = np.random.default_rng(0)
    outputs = {t.name: torch.tensor(generator.standard_normal((5, t.outputs)), dtype=torch.float32) for t in tasks}
    targets = {"a": torch.tensor([0, 1, 2, 1, 0]), "b": torch.ones(5, 4), "c": torch.zeros(5, 2)}
    losses = supervised_losses(outputs, targets, tasks)
    log_prob = outputs["a"] - outputs["a"].exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(losses["a"], -log_prob[torch.arange(5), targets["a"]].sum())
    torch.testing.assert_close(losses["b"], -outputs["b"].sigmoid().log().sum() / 4)
    torch.testing.assert_close(losses["c"], outputs["c"].square().sum() / 2)
