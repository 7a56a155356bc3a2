"""Every parameter of every recipe, by name, and the options of every kind, against the models themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moemm.config import Config, LoadedConfig, load_config
from moemm.data.catalogue import Catalogue
from moemm.modalities import KINDS, ModalitySpec
from moemm.plan import kinds
from moemm.plan.network import is_vector
from moemm.plan.parameters import active, active_of, build_shape, parameters, trained
from moemm.plan.shape import DataShape
from moemm.plan.source import from_data
from moemm.testing.tiny import tiny_config
from moemm.train.engine import parameter_groups
from moemm.train.only import count_trained, freeze
from moemm.train.setup import Setup, learn_modalities, seeded_model

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "recipes").glob("*.yaml"))
Learned = tuple[Catalogue, dict[str, ModalitySpec], DataShape]


@pytest.fixture(scope="module")
def learn() -> Callable[[LoadedConfig], Learned]:
    """Catalogue, specs and what the plan sees of the data; read once for recipes with the same data."""
    known: dict[str, Learned] = {}

    def learned(loaded: LoadedConfig) -> Learned:
        key = repr((loaded.config.data.tasks, loaded.config.data.joint_labels, loaded.config.modalities))
        if key not in known:
            known[key] = (*learn_modalities(loaded), from_data(loaded))
        return known[key]

    return learned


def model_of(config: Config, learned: Learned) -> Any:
    return seeded_model(Setup(config, learned[0], learned[1], Path(), 10), torch.device("cpu"))


def check(config: Config, learned: Learned) -> None:
    model, shape = model_of(config, learned), build_shape(config, learned[2])
    freeze(model, config.train.only)
    sizes = parameters(shape)
    assert sizes == {name: one.numel() for name, one in model.named_parameters()}
    assert (sum(sizes.values()), active(shape, sizes)) == model.num_parameters()
    for row in model.map.rows:
        assert active_of(shape, sizes, *row) == model.active_parameters(*row)
    assert sum(trained(shape, sizes).values()) == count_trained(model)
    groups = {
        group["weight_decay"]: {id(one) for one in group["params"]}
        for group in parameter_groups(model, weight_decay=1.0)
    }
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert [name for name, one in named.items() if is_vector(name) != (id(one) in groups.get(0.0, ()))] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path: Path, learn: Callable[[LoadedConfig], Learned]) -> None:
    loaded = load_config(path, ["--train.init", "null"])
    check(loaded.config, learn(loaded))


@pytest.mark.parametrize(
    "model",
    [
        {"experts": {"groups": [
            {"kind": "shared", "width": 16}, {"kind": "lora", "base": "shared", "rank": 2, "count": 3},
            {"kind": "zero"}, {"kind": "routed", "width": 8, "layers": "first-1"},
        ]}, "activation": "swiglu"},
        {"experts": {"groups": [{"kind": "shared", "width": 8}, {"kind": "routed", "width": 12, "tasks": ["tones"]},
                                {"kind": "routed", "width": 12, "tasks": ["shapes"]}]}},
        {"router": {"kind": "noisy", "losses": {"load": 0.1}}, "missing": {"kind": "predict", "width": 24}},
        {"moe": "dense", "missing": {"kind": "bank"}, "untie": ["norms", "qkv"], "latents": 3},
    ],
    ids=["lora and zero", "skills", "noisy and predict", "dense and bank"],
)  # fmt: skip
def test_what_no_recipe_has(model: dict[str, Any], tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, model={"dim": 16, "heads": 2, **model}, harmonize={"scale": "uncertainty"})
    check(loaded.config, (*learn_modalities(loaded), from_data(loaded)))


def test_tensors_that_stand_still_are_not_trained(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path, train={"steps": 2, "batch_size": 8, "only": ["heads.*", "*.router.*"]})
    check(loaded.config, (*learn_modalities(loaded), from_data(loaded)))


def test_the_kinds_have_the_options_of_their_tokenizers() -> None:
    own = {kind: dict(one.defaults) for kind, one in KINDS.items() if one.__module__.startswith("moemm.")}
    assert own == kinds.OPTIONS
