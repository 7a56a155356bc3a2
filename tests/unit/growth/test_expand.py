"""From E experts to m E: the output of every router kind, and which experts are copied more than others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import sparse, trained

from moemm.config import load_config
from moemm.errors import ConfigError
from moemm.growth import Receipt, Wanted, upcycle
from moemm.growth.expand import importance
from moemm.growth.probe import task_loss
from moemm.growth.samples import training_batches
from moemm.train import load_run

POOL = {"kind": "routed", "count": 3, "width": 8}
ROUTERS: list[dict[str, Any]] = [
    {}, {"top_k": 2, "gates": "renormalised"}, {"top_k": 2, "gates": "straight_through", "bias_rate": 0.1},
    {"kind": "sigmoid", "scope": "modality"}, {"kind": "laplace"}, {"kind": "noisy"}, {"kind": "hard"},
    {"kind": "combination"}, {"kind": "expert_choice"}, {"kind": "top_p", "p": 0.5},
]  # fmt: skip


def grown(source: Path, target: Path, **wanted: Any) -> Receipt:
    return upcycle(source, Wanted(method="expand", output=target, **wanted), tell=lambda line: None)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a pool, experts of each modality, and a zero expert."""
    groups = [POOL, {"kind": "routed", "count": 1, "width": 4, "per_modality": True}, {"kind": "zero"}]
    return trained(tmp_path_factory.mktemp("uneven"), model=sparse({}, *groups))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.get("kind", router.get("gates", "raw")))
def test_equally_many_copies_change_nothing(router: dict[str, Any], tmp_path: Path) -> None:
    run = trained(tmp_path, model=sparse(router, POOL), train={"output": str(tmp_path / "run"), "steps": 2})
    receipt = grown(run, tmp_path / "out", factor=3)
    asked = receipt.proofs[0].most is not None
    assert asked == (router.get("kind") not in ("expert_choice", "top_p"))
    assert receipt.ok and (not asked or receipt.proofs[0].value <= 1e-5)
    made = load_config(tmp_path / "out" / "config.yaml").config.model
    assert made.experts.groups[1].count == 9
    assert made.router.top_k == (None if router.get("kind") in ("hard", "top_p") else 3 * router.get("top_k", 1))


def test_copies_are_copies(uneven: Path, tmp_path: Path) -> None:
    receipt = grown(uneven, tmp_path / "out")
    before, after = (load_run(folder).model.state_dict() for folder in (uneven, tmp_path / "out"))
    copies = receipt.details["copies"]
    assert [len(made) for made in copies.values()] == [2] * 7, "zero experts too: a softmax counts them"
    assert receipt.ok
    for old, made in copies.items():
        for name in (f"trunk.blocks.0.ffn.router.rows.all.{old}", f"trunk.blocks.1.ffn.experts.{old}.w1_FD"):
            if name in before:
                assert all(torch.equal(after[name.replace(old, new)], before[name]) for new in made)
    shared = "trunk.blocks.0.ffn.shared.shared.w1_FD"
    assert torch.equal(before[shared], after[shared])


def test_importance_is_gradient_times_weight(uneven: Path) -> None:
    run = load_run(uneven)
    batches = training_batches(run, 32, size=16)
    found = importance(run.model, batches)
    expected = dict.fromkeys(found, 0.0)
    for batch in batches:
        loss = task_loss(run.model, [batch])
        for layer in run.model.trunk.blocks:
            for name in found:
                own = list(layer.ffn.experts[name].parameters())
                grads = torch.autograd.grad(loss, own, retain_graph=True)
                expected[name] += sum(float((g * p.detach()).abs().sum()) for g, p in zip(grads, own, strict=True))
    assert set(found) == {e.id for e in run.model.map.of_role("routed") if e.width}
    assert found == pytest.approx(expected, rel=1e-4) and max(found.values()) > 0


def test_more_copies_where_the_gradient_is(uneven: Path, tmp_path: Path) -> None:
    receipt = grown(uneven, tmp_path / "out", duplicates="gradient", factor=4)
    copies, weight = receipt.details["copies"], receipt.details["importance"]
    pool = sorted((name for name in copies if name in ("routed_0", "routed_1", "routed_2")), key=weight.__getitem__)
    numbers = [len(copies[name]) for name in pool]
    assert numbers == sorted(numbers) and sum(numbers) == 12 and min(numbers) >= 1 and numbers[-1] > 4
    assert receipt.ok and any(proof.most is None and "relative error" in proof.what for proof in receipt.proofs)
    assert any("gradient x weight" in line for line in receipt.changed)
    assert load_run(tmp_path / "out").step == 0


def test_lora_experts_cannot_be_copied(tmp_path: Path) -> None:
    groups = [{**POOL, "id": "pool"}, {"kind": "lora", "base": "pool_0", "rank": 2}]
    run = trained(tmp_path, model=sparse({}, *groups), train={"output": str(tmp_path / "run"), "steps": 1})
    with pytest.raises(ConfigError, match="lora experts lora"):
        grown(run, tmp_path / "out")
