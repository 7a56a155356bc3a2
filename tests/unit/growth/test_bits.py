"""Adding a modality, its task and its experts to a model changes no bit of what it says of the old ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from extended import OLD, Known, base_config, built, grown_config, old_batches, outputs, says, shaken

from moemm.config.schema import ExpertGroupConfig, ExpertsConfig, MissingConfig, RouterConfig
from moemm.moe.routers import ROUTERS
from moemm.train.setup import learn_modalities

Group = ExpertGroupConfig
ALONE = [
    Group(kind="shared", width=16), Group(kind="routed", count=5, width=8, per_modality=True, modalities=list(OLD))
]  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"router": RouterConfig(kind=kind, top_k=None if kind == "hard" else 2)} for kind in sorted(ROUTERS)},
    "top_p renormalised": {"router": RouterConfig(kind="top_p", p=0.9, gates="renormalised")},
    "renormalised": {"router": RouterConfig(top_k=2, gates="renormalised")},
    "straight through": {"router": RouterConfig(kind="batch_priority", gates="straight_through")},
    "biased": {"router": RouterConfig(kind="sigmoid", top_k=2, bias_rate=0.1)},
    "own routers": {"router": RouterConfig(top_k=2, scope="modality")},
    "own distances": {"router": RouterConfig(kind="laplace", top_k=2, scope="modality")},
    "disjoint": {"router": RouterConfig(top_k=2, scope="disjoint"), "groups": ALONE},
    "many": {
        "router": RouterConfig(kind="top_p", p=0.8),
        "groups": [Group(kind="shared", width=16), Group(kind="routed", count=14, width=8)],
    },
    "bank": {"missing": MissingConfig(kind="bank")},
    "predict": {"missing": MissingConfig(kind="predict")},
    "latents": {"latents": 3},
    "untied": {"untie": ["norms", "qkv"]},
    "swiglu": {"activation": "swiglu", "predict_every_block": True},
    "ordered": {"ordered": True},
}


NEW = ("spectrum", "radar", "lidar", "echo", "touch")
Data = tuple[Path, Known]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A folder with the files of all extensions, and what is learned from them."""
    folder = tmp_path_factory.mktemp("data")
    loaded = base_config(folder)
    for name in NEW:
        loaded = grown_config(loaded, name)
    return folder, learn_modalities(loaded)


def five(data: Data, *, backend: str = "auto", **model: Any) -> list[list[torch.Tensor]]:
    """What a model says of old batches, and after each of five extensions in a row."""
    folder, known = data
    loaded = base_config(folder, **model)
    loaded.config.model.experts = ExpertsConfig(groups=loaded.config.model.experts.groups, backend=backend)  # type: ignore[arg-type]
    catalogue, grown = built(loaded, known)
    shaken(grown)
    found = [outputs(catalogue, grown)]
    for number, name in enumerate(NEW):
        loaded = grown_config(loaded, name, norms="norms" not in loaded.config.model.untie and number != 1)
        before = {key: value.clone() for key, value in grown.state_dict().items()}
        catalogue, grown = built(loaded, known, before)
        after = grown.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items()), "no tensor was reshaped"
        assert any(f".{name}" in key for key in set(after) - set(before)), "there are new ones"
        found.append(outputs(catalogue, grown))
    return found


@pytest.mark.parametrize("case", CASES)
def test_old_outputs_keep_their_bits(data: Data, case: str) -> None:
    base, *grown = five(data, **CASES[case])
    assert all(value.abs().sum() > 0 for value in base if value.numel())
    for number, one in enumerate(grown, 1):
        assert all(torch.equal(a, b) for a, b in zip(base, one, strict=True)), f"after {number} extensions"


def test_old_outputs_keep_their_bits_in_plain_torch(data: Data) -> None:
    base, *grown = five(data, backend="torch", router=RouterConfig(top_k=2))
    assert all(torch.equal(a, b) for one in grown for a, b in zip(base, one, strict=True))


def test_outputs_are_seen_to_change_where_an_old_weight_does(data: Data) -> None:
    """Otherwise the tests above tell nothing."""
    loaded = base_config(data[0], router=RouterConfig(top_k=2))
    catalogue, model = built(loaded, data[1])
    shaken(model)
    batches = old_batches(catalogue)
    before = says(batches, model)
    for name, value in model.state_dict().items():
        if "routed" not in name and "linear" not in name:
            continue  # of each other tensor the same is true, but some move no bit by so little
        kept = value.clone()
        value.mul_(1.01)
        assert any(not torch.equal(a, b) for a, b in zip(before, says(batches, model), strict=True)), name
        value.copy_(kept)
