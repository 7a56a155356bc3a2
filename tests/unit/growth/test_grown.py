"""Receipts, and run folders that were written by an operation instead of by training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moemm.config import LoadedConfig, load_config
from moemm.errors import CheckpointError, ConfigError
from moemm.growth import Proof, Receipt, Size, read_base, read_receipt, write_grown
from moemm.growth.grown import fresh_model, size_of
from moemm.growth.receipt import lineage, weights_hash
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained run."""
    loaded = tiny_config(tmp_path_factory.mktemp("base"))
    deterministic = torch.are_deterministic_algorithms_enabled()
    train(loaded)
    torch.use_deterministic_algorithms(deterministic)
    return Path(loaded.config.train.output)


def receipt(source: Path, target: Path, **given: Any) -> Receipt:
    """One that tells nothing but where from and where to."""
    base = read_base(source)
    size = size_of(base.run.model)  # type: ignore[arg-type]
    values: dict[str, Any] = {
        "operation": "copy", "sources": [base.as_source()], "target": str(target), "changed": [], "proofs": [],
        "before": size, "after": size, "optimizer": "not kept", **given,
    }  # fmt: skip
    return Receipt(**values)


def grow(source: Path, target: Path, **config: Any) -> LoadedConfig:
    """Write the run again as it is, as a grown one, with other values in `train` or `deepspeed`."""
    base = read_base(source)
    changed = replace(
        base.run.config,
        train=replace(base.run.config.train, output=str(target), **config.get("train", {})),
        deepspeed=replace(base.run.config.deepspeed, **config.get("deepspeed", {})),
    )
    loaded = LoadedConfig(config=changed, path=source / "config.yaml", source={}, origins={})
    model = fresh_model(changed, base.run.catalogue, base.run.specs)
    model.load_state_dict(base.weights)
    history = lineage(source)
    write_grown(loaded, base.run.catalogue, base.run.specs, model, receipt(source, target, history=history))
    return load_config(target / "config.yaml")


@pytest.mark.parametrize(
    ("value", "most", "least", "ok"),
    [
        (0.5, 1.0, None, True), (1.5, 1.0, None, False), (0.5, None, 1.0, False), (1.5, None, 1.0, True),
        (2.0, None, None, None), (float("nan"), 1.0, None, False),
    ],
)  # fmt: skip
def test_a_proof_holds_where_it_is_asked_to(
    value: float, most: float | None, least: float | None, ok: bool | None
) -> None:
    assert Proof(what="error", value=value, most=most, least=least).ok is ok


def test_a_receipt_with_a_failed_proof_is_not_ok_and_is_json(tmp_path: Path) -> None:
    proofs = [Proof(what="told", value=3.0), Proof(what="error", value=float("nan"), most=1.0)]
    size = Size(total=10, active=5)
    made = Receipt(
        operation="x", sources=[], target="t", changed=[], proofs=proofs, before=size, after=size, optimizer=""
    )
    made.write(tmp_path)
    found = read_receipt(tmp_path)
    assert found is not None and found["ok"] is False
    assert [proof["value"] for proof in found["proofs"]] == [3.0, None], "NaN is no JSON"


def test_the_hash_sees_every_change() -> None:
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(())}
    plain = weights_hash(weights)
    assert weights_hash({"b": torch.zeros(()), "a": torch.ones(2, 3)}) == plain
    changes: list[dict[str, torch.Tensor]] = [
        {**weights, "a": torch.ones(3, 2)}, {**weights, "a": torch.ones(2, 3).nextafter(torch.zeros(()))},
        {**weights, "b": -torch.zeros(())}, {"a": weights["a"]}, {"a": weights["a"], "c": weights["b"]},
        {**weights, "a": weights["a"].view(torch.int32)},
    ]  # fmt: skip
    assert len({plain, *map(weights_hash, changes)}) == 1 + len(changes)


def test_a_grown_run_is_a_run(trained: Path, tmp_path: Path, alone: None) -> None:
    """It can be loaded, trained with another ZeRO stage, and grown again."""
    first = tmp_path / "first"
    loaded = grow(trained, first, train={"steps": 3}, deepspeed={"zero_stage": 1})
    before, after = load_run(trained).model.state_dict(), load_run(first).model.state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    summary = train(loaded, resume=True)
    assert summary["steps"] == 3, "it begins with step 0"
    messages = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert messages, "it has metrics of its own"
    moved = load_run(first).model.state_dict()
    assert not torch.equal(moved["heads.linear.tones.weight"], before["heads.linear.tones.weight"])
    grow(first, tmp_path / "second")
    found = lineage(tmp_path / "second")
    assert [one["target"] for one in found] == [str(first), str(tmp_path / "second")]
    assert found[1]["sources"][0]["step"] == 3


def test_training_begins_with_the_grown_weights(trained: Path, tmp_path: Path, alone: None) -> None:
    loaded = grow(trained, tmp_path / "grown", train={"steps": 1, "lr": 1e-12, "weight_decay": 0.0})
    train(loaded, resume=True)
    before, after = load_run(trained).model.state_dict(), load_run(tmp_path / "grown").model.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0.0, atol=1e-9)


def test_a_run_is_not_written_over(trained: Path, tmp_path: Path) -> None:
    grow(trained, tmp_path / "grown")
    before = (tmp_path / "grown" / "receipt.json").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        grow(trained, tmp_path / "grown")
    assert (tmp_path / "grown" / "receipt.json").read_bytes() == before


def test_a_broken_receipt_is_told(trained: Path, tmp_path: Path) -> None:
    grow(trained, tmp_path / "grown")
    path = tmp_path / "grown" / "receipt.json"
    path.write_text(path.read_text()[:-5])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_receipt(tmp_path / "grown")
    path.write_text('{"format": 99}')
    with pytest.raises(CheckpointError, match="no receipt of format 1"):
        read_receipt(tmp_path / "grown")
    assert read_receipt(trained) is None
