"""Every recipe from a dense model of the same trunk: the same outputs, and routers with a gradient; k = 1, 2, 4."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moemm.config import Config, LoadedConfig, load_config, to_yaml
from moemm.data.catalogue import Catalogue
from moemm.data.sample import PackedBatch
from moemm.growth.grown import Specs, fresh_model
from moemm.growth.probe import EXACT
from moemm.growth.samples import mixture_batches
from moemm.growth.upcycling import Start, Wanted, from_dense, proofs_of
from moemm.moe import ExpertMap, active_experts
from moemm.train.setup import learn_modalities

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
ROUTED = ("flexmoe", "fusemoe", "limoe", "moemm", "moma", "quickstart")
CASES = [(path, k) for path in RECIPES for k in ((1, 2, 4) if path.stem in ROUTED else (1,))]
OWN_DATA = ("align", "conflict")
Known = tuple[Catalogue, Specs, list[PackedBatch]]


@functools.cache
def known_of(recipe: str) -> Known:
    """Tasks and modalities of a recipe's data, and 24 samples of it."""
    loaded = load_config(ROOT / "configs" / "recipes" / f"{recipe}.yaml")
    catalogue, specs = learn_modalities(loaded)
    return catalogue, specs, mixture_batches(loaded.config, catalogue, specs, 24, size=24)


def with_top_k(path: Path, top_k: int) -> Config:
    """A recipe whose tokens use `top_k` routed experts, with enough of them."""
    loaded: LoadedConfig = load_config(path)
    model = loaded.config.model
    groups = [replace(g, count=max(g.count, 2 * top_k)) if g.kind == "routed" else g for g in model.experts.groups]
    router = model.router
    if path.stem in ROUTED:
        gates = "raw" if router.gates == "renormalised" and top_k == 1 else router.gates
        router = replace(router, top_k=top_k, gates=gates)
        model = replace(model, experts=replace(model.experts, groups=groups), router=router)
    data = replace(loaded.config.data, root=str(ROOT / "data" / "quickstart"))
    return replace(loaded.config, model=model, data=data, train=replace(loaded.config.train, init=None))


def dense_start(config: Config, known: Known, folder: Path) -> Start:
    """A dense model with random weights, as wide as what a token passes through in the narrowest layer."""
    catalogue, specs, _ = known
    model = config.model
    whole = ExpertMap.from_config(model.experts.groups, list(specs), [t.name for t in catalogue.tasks], model.layers)
    layers = [whole.at_layer(layer) for layer in range(model.layers)]
    used = active_experts(model.router)
    width = min(one.active(row, lambda e: e.width, top_k=used) for one in layers for row in one.rows)
    if model.router.kind == "expert_choice":
        width = 256  # experts take tokens one by one: a copy has to hold the whole network
    group = replace(model.experts.groups[0], kind="shared", width=width, count=1, modalities=None, layers="all")
    plain = replace(model, moe="dense", untie=[], router=type(model.router)())
    plain = replace(plain, experts=replace(model.experts, groups=[replace(group, per_modality=False, id=None)]))
    dense = replace(config, model=plain, modalities=config.modalities)
    made = fresh_model(dense, catalogue, specs).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name: value.clone() for name, value in made.state_dict().items()}
    return Start(
        config=dense, catalogue=catalogue, specs=specs, model=made, weights=weights, path=folder / "dense.yaml",
        sources=[{"folder": "dense"}],
    )  # fmt: skip


@pytest.mark.parametrize(("path", "top_k"), CASES, ids=lambda value: getattr(value, "stem", str(value)))
def test_a_recipe_computes_what_the_dense_model_does(path: Path, top_k: int, tmp_path: Path) -> None:
    known = known_of(path.stem if path.stem in OWN_DATA else "quickstart")
    config = with_top_k(path, top_k)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    start = dense_start(config, known, tmp_path)
    made = from_dense(start, Wanted(recipe=recipe), tmp_path / "out")
    proofs = {proof.what: proof for proof in proofs_of(start.model, made, known[2])}
    exact = [proof.value for proof in proofs.values() if proof.most == EXACT]
    assert len(exact) == 1 and exact[0] <= EXACT, proofs
    assert all(proof.ok is not False for proof in proofs.values()), proofs
    limited = config.model.router.kind in ("expert_choice", "batch_priority") and top_k == 1
    if limited:
        assert max(proof.value for proof in proofs.values() if "lose their place" in proof.what) > EXACT
    # skillnet's router averages: it has nothing to learn.
    assert any("gradient" in what for what in proofs) == (path.stem in (*ROUTED, "finetune", "pretrain", *OWN_DATA))
