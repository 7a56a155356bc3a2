"""`moemm merge RUN --experts N`: the routed experts of a run made fewer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from merge_cases import Weights, weights_of, write_run

import moemm
from moemm.cli.app import main
from moemm.config import load_config
from moemm.errors import ConfigError, DataError
from moemm.growth import read_base, read_receipt
from moemm.growth.align import match_units, permuted
from moemm.growth.fewer import find_clusters, look, merged_weights, permuted_weights, plan_fewer
from moemm.growth.samples import training_batches
from moemm.models import Model
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train

SHARED = {"kind": "shared", "width": 16}
ROUTED = {"kind": "routed", "count": 4, "width": 8}


def model(*groups: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The section of a small model with these groups and a shared expert."""
    return {"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": [SHARED, *groups]}, **changes}


def expert(weights: Weights, layer: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    prefix = f"trunk.blocks.{layer}.ffn.experts.{name}"
    return weights[f"{prefix}.w1_FD"], weights[f"{prefix}.w2_DF"]


def put(weights: Weights, layer: int, name: str, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    prefix = f"trunk.blocks.{layer}.ffn.experts.{name}"
    weights[f"{prefix}.w1_FD"], weights[f"{prefix}.w2_DF"] = pair


def planted(folder: Path, activation: str) -> Path:
    """A run in which experts 2 and 3 are experts 1 and 0 with their hidden units in another order."""
    section = model(ROUTED, activation=activation)
    weights = weights_of(write_run(folder, "plain", model=section))
    draw = torch.Generator().manual_seed(0)
    for layer in (0, 1):
        for copy, own in (("routed_2", "routed_1"), ("routed_3", "routed_0")):
            order_F = torch.randperm(8, generator=draw)
            put(weights, layer, copy, permuted(expert(weights, layer, own), order_F))
    return write_run(folder, "planted", weights=weights, model=section)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "swiglu"])
def test_permuted_copies_become_what_they_are_copies_of(activation: str, tmp_path: Path) -> None:
    """Averaged without matching they would become something else."""
    run = planted(tmp_path, activation)
    made = moemm.merge([run], experts=2, output=tmp_path / "fewer", samples=64)
    assert made.ok
    before, after = weights_of(run), weights_of(tmp_path / "fewer")
    for layer in (0, 1):
        clusters = {one["expert"]: one for one in made.details["clusters"] if one["layer"] == layer}
        assert [one["of"] for one in clusters.values()] == [["routed_0", "routed_3"], ["routed_1", "routed_2"]]
        for number, (name, cluster) in enumerate(clusters.items()):
            assert cluster["likeness"] == pytest.approx(1.0, abs=1e-5)
            found, own = expert(after, layer, name), expert(before, layer, f"routed_{number}")
            back = permuted(found, match_units(own, found))
            for one, other in zip(back, own, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
            plain = (own[0] + expert(before, layer, cluster["of"][1])[0]) / 2
            assert not torch.allclose(plain, own[0], atol=0.05)


def test_the_mean_is_that_of_matched_units_by_usage(tmp_path: Path) -> None:
    """Against plain torch, from the members and shares of the receipt; router rows alike, all else as it was."""
    run = write_run(tmp_path, "run", model=model(ROUTED))
    made = moemm.merge([run], experts=2, output=tmp_path / "fewer", samples=64)
    before, after = weights_of(run), weights_of(tmp_path / "fewer")
    touched = set()
    for one in made.details["clusters"]:
        layer, members, shares = one["layer"], one["of"], one["shares"]
        assert sum(shares) == pytest.approx(1.0)
        best = expert(before, layer, members[shares.index(max(shares))])
        rows, pairs = [], []
        for name in members:
            pairs.append(permuted(expert(before, layer, name), match_units(best, expert(before, layer, name))))
            rows.append(before[f"trunk.blocks.{layer}.ffn.router.rows.all.{name}"])
        for part in (0, 1):
            expected = sum(share * pair[part] for share, pair in zip(shares, pairs, strict=True))
            torch.testing.assert_close(expert(after, layer, one["expert"])[part], cast(torch.Tensor, expected))
        row = after[f"trunk.blocks.{layer}.ffn.router.rows.all.{one['expert']}"]
        torch.testing.assert_close(row, cast(torch.Tensor, sum(s * r for s, r in zip(shares, rows, strict=True))))
        touched |= {name for name in after if f"blocks.{layer}." in name and f".{one['expert']}" in name}
    rest = set(after) - touched
    assert len(touched) == 2 * 2 * 3 and all(torch.equal(after[name], before[name]) for name in rest)


def test_shares_are_what_the_router_sends(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", model=model(ROUTED))
    made = moemm.merge([run], experts=1, output=tmp_path / "fewer", samples=32)
    loaded = load_run(run)
    load_E = torch.zeros(4)
    for batch in training_batches(loaded, 32, size=32):
        load_E += loaded.model(batch).router.load_LME[0].sum(0).detach()
    (first, _) = made.details["clusters"]
    assert first["shares"] == pytest.approx((load_E / load_E.sum()).tolist())


def test_exchanging_hidden_units_alone_keeps_the_outputs(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", model=model(ROUTED, activation="swiglu"))
    base = read_base(run)
    whole = cast(Model, base.run.model)
    _, pools = plan_fewer(base.run.config, whole, 2)
    batches = training_batches(base.run, 32, size=32)
    clusters = find_clusters(whole, pools, look(whole, batches))
    moved = permuted_weights(base.weights, clusters)
    assert sum(not torch.equal(moved[name], value) for name, value in base.weights.items()) >= 4, "some units moved"
    with torch.no_grad():
        before = whole(batches[0]).outputs
        whole.load_state_dict(moved)
        for name, value in whole(batches[0]).outputs.items():
            torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    made = moemm.merge([run], experts=2, output=tmp_path / "fewer", samples=32)
    (proof,) = [proof for proof in made.proofs if "exchanging hidden units alone" in proof.what]
    assert proof.most == 1e-6 and proof.ok and proof.value > 0.0


GROUPS = [
    {"kind": "routed", "count": 3, "width": 8, "layers": "0"},
    {"kind": "routed", "count": 2, "width": 8, "layers": "1"},
    {"kind": "routed", "count": 3, "width": 8, "per_modality": True},
    {"kind": "routed", "count": 3, "width": 4, "tasks": ["tones"], "id": "skill"},
    {"kind": "zero", "count": 2},
]


def test_experts_for_different_things_are_never_mixed(tmp_path: Path) -> None:
    """Modalities, tasks and layers; and those that stay keep their weights under their new names."""
    run = write_run(tmp_path, "run", model=model(*GROUPS, router={"kind": "noisy"}))
    made = moemm.merge([run], experts=2, output=tmp_path / "fewer", samples=64)
    assert made.ok
    clusters = made.details["clusters"]
    families = {"routed", "routed_image", "routed_record", "routed_series", "skill"}
    for one in clusters:
        (family,) = {name.rpartition("_")[0] for name in one["of"]}
        assert one["expert"].rpartition("_")[0] == family
        families.discard(family)
    assert not families, "each was merged"
    assert {one["layer"] for one in clusters if one["expert"] in ("routed_0", "routed_1")} == {0}
    experts = {expert.id for expert in cast(Model, load_run(tmp_path / "fewer").model).map.experts}
    pairs = ("routed_image", "routed_record", "routed_series", "skill", "zero")
    named = {f"{name}_{number}" for name in pairs for number in (0, 1)}
    assert experts == {"shared", *named, *(f"routed_{number}" for number in range(4))}
    before, after = weights_of(run), weights_of(tmp_path / "fewer")
    for old, new in (("routed_3", "routed_2"), ("routed_4", "routed_3")):
        for one, other in zip(expert(before, 1, old), expert(after, 1, new), strict=True):
            assert torch.equal(one, other)
        for part in ("rows.all", "noise"):
            prefix = f"trunk.blocks.1.ffn.router.{part}"
            assert torch.equal(before[f"{prefix}.{old}"], after[f"{prefix}.{new}"])
        assert f"renamed: {old} is {new} now" in made.changed
    for number in (0, 1):
        name = f"trunk.blocks.0.ffn.router.rows.all.zero_{number}"
        assert torch.equal(before[name], after[name])


def test_routers_of_each_modality_and_their_biases_are_averaged(tmp_path: Path) -> None:
    router = {"kind": "sigmoid", "bias_rate": 0.01, "scope": "modality"}
    weights = weights_of(write_run(tmp_path, "plain", model=model(ROUTED, router=router)))
    for number in range(4):
        weights[f"trunk.blocks.0.ffn.router.bias_routed_{number}"] += number
    run = write_run(tmp_path, "run", weights=weights, model=model(ROUTED, router=router))
    made = moemm.merge([run], experts=1, output=tmp_path / "fewer", samples=32)
    shares = made.details["clusters"][0]["shares"]
    after = weights_of(tmp_path / "fewer")
    expected = sum(number * share for number, share in enumerate(shares))
    assert float(after["trunk.blocks.0.ffn.router.bias_routed_0"]) == pytest.approx(expected)
    for scope in ("image", "record", "series"):
        prefix = f"trunk.blocks.0.ffn.router.rows.{scope}.routed_"
        row = sum(share * weights[f"{prefix}{number}"] for number, share in enumerate(shares))
        torch.testing.assert_close(after[f"{prefix}0"], cast(torch.Tensor, row))


def test_it_is_a_run_that_trains_on(tmp_path: Path, alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny_config(tmp_path, model=model(ROUTED), train={"output": str(tmp_path / "run"), "steps": 4,
                                                             "batch_size": 8, "baselines": False})  # fmt: skip
    train(made)
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "run"), "--experts", "2", "--output", str(tmp_path / "fewer")]) == 0
    out = capsys.readouterr().out
    for text in ("merge experts", "4 experts became 2", "at most 1e-06", "holds", "tones accuracy"):
        assert text in out
    receipt = read_receipt(tmp_path / "fewer")
    assert receipt is not None and receipt["ok"] and receipt["after"]["total"] < receipt["before"]["total"]
    told = [proof["what"] for proof in receipt["proofs"]]
    assert f"val accuracy of tones: {tmp_path / 'run'}" in told and "val accuracy of tones: result" in told
    loaded = load_config(tmp_path / "fewer" / "config.yaml", ["--train.steps", "2"])
    assert [group.count for group in loaded.config.model.experts.groups] == [1, 2]
    assert train(loaded, resume=True)["steps"] == 2


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        (model(ROUTED), 4, "--experts 4: the routed groups of the run have 4 experts.*\n.*allowed: 1 to 3"),
        (model(ROUTED), 0, "--experts 0: must be at least 1"),
        (model(), 2, "no routed experts to merge: no group .* is routed"),
        (model({"kind": "zero", "count": 4}), 2, "no routed experts to merge"),
        (model(ROUTED, moe="dense"), 2, "no routed experts to merge: model.moe is dense"),
        (model(ROUTED, router={"top_k": 3}), 2, "--experts 2 does not fit the run.*(.|\n)*top_k"),
        (model(ROUTED, {"kind": "lora", "base": "routed_3", "rank": 2}), 2, "lora experts of base routed_3"),
    ],
)
def test_runs_whose_experts_cannot_be_merged(section: dict[str, Any], given: int, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", model=section)
    with pytest.raises(ConfigError, match=message):
        moemm.merge([run], experts=given, output=tmp_path / "fewer")
    assert not (tmp_path / "fewer").exists()


def test_options_of_soups_are_not_for_experts(tmp_path: Path) -> None:
    for given in ({"method": "uniform"}, {"base": "x"}, {"alphas": [1.0]}):
        with pytest.raises(ConfigError, match="says how several runs are averaged"):
            moemm.merge(["run"], experts=2, output=tmp_path / "fewer", **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the experts of one run, 2 were given: a, b"):
        moemm.merge(["a", "b"], experts=2, output=tmp_path / "fewer")


def test_experts_without_tokens_cannot_be_compared(tmp_path: Path) -> None:
    group = {"kind": "routed", "count": 2, "width": 8, "tasks": ["tones"]}
    run = write_run(tmp_path, "run", model=model(ROUTED, group))
    base = read_base(run)
    whole = cast(Model, base.run.model)
    _, pools = plan_fewer(base.run.config, whole, 1)
    batch = next(b for b in training_batches(base.run, 16, size=1) if not len(b.targets["tones"]))
    with pytest.raises(DataError, match="no token of the samples may use the experts"):
        find_clusters(whole, pools, look(whole, [batch]))


def test_experts_that_nothing_uses_count_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", model=model(ROUTED))
    base = read_base(run)
    whole = cast(Model, base.run.model)
    _, pools = plan_fewer(base.run.config, whole, 1)
    seen = look(whole, training_batches(base.run, 8, size=8))
    for layer in seen.values():
        layer.load = dict.fromkeys(layer.load, 0.0)
    clusters = find_clusters(whole, pools, seen)
    assert all(cluster.shares == (0.25,) * 4 for cluster in clusters)
    made = merged_weights(base.weights, pools, clusters)
    assert sum(".experts." in name for name in made) == 2 * 2
