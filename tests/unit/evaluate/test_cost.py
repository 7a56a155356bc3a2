"""Operations counted from shapes and hooks, against torch's own counter and against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moemm.data import build_catalogue
from moemm.data.catalogue import Catalogue
from moemm.evaluate import EvaluationPlan, count_cost, evaluate_model
from moemm.modalities import fit_modalities
from moemm.models import Model, build_model
from moemm.testing.tiny import tiny_config
from moemm.train.setup import train_values

DIM, LAYERS = 16, 2


def make(folder: Path, **model: Any) -> tuple[Model, Catalogue]:
    base = tiny_config(folder).config.model
    groups = [
        {"kind": "shared", "width": 16},
        {"kind": "modality", "width": 8},
        {"kind": "routed", "count": 2, "width": 8},
    ]
    values = {"dim": DIM, "heads": 2, "layers": LAYERS, "experts": {"groups": groups}, **model}
    loaded = tiny_config(folder, model=values)
    assert base.dim == DIM
    catalogue = build_catalogue(loaded.config.data, base=loaded.path.parent)
    specs = fit_modalities(catalogue.modalities, {}, lambda name: train_values(catalogue, name))
    torch.manual_seed(0)
    return build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks), catalogue


@pytest.mark.parametrize(
    "options",
    [{}, {"latents": 3}, {"predict_every_block": True}, {"untie": ["norms", "qkv"]}],
    ids=["plain", "latents", "every block", "untied"],
)
def test_a_dense_model_costs_what_torch_counts(tmp_path: Path, options: dict[str, Any]) -> None:
    model, catalogue = make(tmp_path, moe="dense", **options)
    # Images alone: samples of equal length, so that attention pads nothing. Attention by its definition, because
    # torch's counter does not know the fused one of the CPU.
    plan = EvaluationPlan(split="test", prepare={}, drop=("record",), tasks=("shapes",))
    counter = FlopCounterMode(display=False)
    sdpa = torch.nn.attention.SDPBackend.MATH
    with count_cost(model) as cost, counter, torch.nn.attention.sdpa_kernel(sdpa):
        evaluate_model(model, catalogue, plan)
    heads = 2 * 24 * 2 * DIM * 3  # 24 samples, pooled 2 D wide, three classes
    heads *= LAYERS if "predict_every_block" in options else 1
    assert sum(cost.operations["image"].values()) == counter.get_total_flops() - heads
    assert cost.operations["record"]["experts"] == 0 and cost.tokens["record"] == 0
    assert cost.operations["image"]["tokenizer"] > 0 and cost.shares["image"] == 1.0


def test_a_sparse_model_by_hand(tmp_path: Path) -> None:
    model, catalogue = make(tmp_path)
    with count_cost(model) as cost:
        evaluate_model(model, catalogue, EvaluationPlan(split="test", prepare={}, tasks=("tones",)))
    tokens = cost.tokens["series"]
    assert tokens > 0
    # gelu: an expert of width F has 2 D F weights. Shared, modality expert, and one routed expert a layer.
    active = 2 * DIM * (16 + 8 + 8)
    found = cost.operations["series"]
    assert found["experts"] == 2 * LAYERS * active * tokens
    assert found["router"] == 2 * LAYERS * 2 * DIM * tokens
    assert found["pooling"] == 2 * 2 * DIM**2 * tokens
    assert found["attention"] > 2 * LAYERS * 4 * DIM**2 * tokens


def test_experts_that_compute_nothing_cost_nothing(tmp_path: Path) -> None:
    groups = [{"kind": "shared", "width": 16}, {"kind": "zero", "count": 2}]
    model, catalogue = make(tmp_path, experts={"groups": groups})
    with count_cost(model) as cost:
        evaluate_model(model, catalogue, EvaluationPlan(split="test", prepare={}, tasks=("tones",)))
    assert cost.operations["series"]["experts"] == 2 * LAYERS * 2 * DIM * 16 * cost.tokens["series"]


def test_a_lora_expert_costs_what_its_base_does(tmp_path: Path) -> None:
    groups = [
        {"kind": "shared", "width": 16, "id": "all"},
        {"kind": "lora", "base": "all", "rank": 2, "modalities": ["series"]},
    ]
    model, catalogue = make(tmp_path, experts={"groups": groups})
    with count_cost(model) as cost:
        evaluate_model(model, catalogue, EvaluationPlan(split="test", prepare={}))
    per_token = {name: cost.operations[name]["experts"] / cost.tokens[name] for name in cost.tokens}
    assert per_token["series"] == 2 * per_token["image"] == 2 * 2 * LAYERS * 2 * DIM * 16


def test_hooks_are_gone_afterwards_also_after_an_error(tmp_path: Path) -> None:
    model, _ = make(tmp_path)
    with pytest.raises(KeyError), count_cost(model):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_ran(tmp_path: Path) -> None:
    model, _ = make(tmp_path)
    with count_cost(model) as cost:
        pass
    assert set(cost.shares.values()) == {0.0}
