"""Gradients of several losses by part of the model, on labels that are opposite by design, and what is made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from opposed import equal_halves, opposed_config

from moemm.analyze import Part, Split, cosines, lasting, products, propose, separate, tapped
from moemm.analyze.conflict import losses_of
from moemm.analyze.gradients import Seen, part_of
from moemm.analyze.split import Atom, all_atoms
from moemm.config import Config, LoadedConfig, load_config
from moemm.config.schema import ExpertGroupConfig, ExpertsConfig
from moemm.data import train_loader
from moemm.data.catalogue import Catalogue
from moemm.data.sample import PackedBatch
from moemm.errors import ConfigError
from moemm.modalities import prepare_functions
from moemm.models import Model, build_model
from moemm.objectives import supervised_losses
from moemm.testing.tiny import tiny_config
from moemm.train.setup import learn_modalities


def built(loaded: LoadedConfig) -> tuple[Model, Catalogue, PackedBatch]:
    """A fresh model, and a training batch."""
    catalogue, specs = learn_modalities(loaded)
    torch.manual_seed(0)
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks)
    with train_loader(catalogue, loaded.config, prepare=prepare_functions(specs)) as loader:
        return model, catalogue, next(iter(loader))


def losses(model: Model, catalogue: Catalogue, batch: PackedBatch) -> dict[str, torch.Tensor]:
    return supervised_losses(model(batch).outputs, batch.targets, catalogue.tasks)


def seen(loaded: LoadedConfig, *, equal: bool = False) -> dict[Part, Seen]:
    model, catalogue, batch = built(loaded)
    if equal:
        weights = model.state_dict()
        equal_halves(weights)
        model.load_state_dict(weights)
    with tapped(model) as taps:
        found = losses(model, catalogue, batch)
    return {part: cosines([one]) for part, one in products(model, found, taps).items()}


def test_opposite_labels_of_the_same_tokens_oppose_everywhere(tmp_path: Path) -> None:
    opposite = seen(opposed_config(tmp_path / "o", joint=True), equal=True)
    same = seen(opposed_config(tmp_path / "s", joint=True, inverted=False), equal=True)
    kinds = {part.kind for part in opposite}
    assert {"attention", "expert", "tokenizer", "norm", "pool"} == kinds
    assert all(one.cos_TT[0, 1] < -0.9 for one in opposite.values())
    assert all(one.cos_TT[0, 1] == pytest.approx(1.0, abs=1e-4) for one in same.values())
    shared = opposite[Part(1, "expert", "shared")]
    assert shared.by_MTT is not None and shared.by_MTT[:, 0, 1].max() < -0.8


def test_cosines_are_those_of_a_loop_over_losses(tmp_path: Path) -> None:
    model, catalogue, batch = built(tiny_config(tmp_path, train={"steps": 1, "batch_size": 32}))
    with tapped(model) as taps:
        found = losses(model, catalogue, batch)
        both = {**found, "sum": found["shapes"] - 0.5 * found["tones"], "none": None}
        got = products(model, both, taps)
    named = dict(model.named_parameters())
    grads = []
    for loss in (found["shapes"], found["tones"], both["sum"]):
        assert loss is not None
        own = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        grads.append({name: grad for name, grad in zip(named, own, strict=True)})
    assert {part for part in map(part_of, named) if part is not None} == set(got)
    met = 0
    for part, one in got.items():
        cos_TT = cosines([one]).cos_TT
        assert np.isnan(cos_TT[3]).all(), "a loss that the batch has nothing of"
        for i, j in itertools.combinations(range(3), 2):
            rows = [name for name in named if part_of(name) == part
                    and all(g[name] is not None and g[name].any() for g in (grads[i], grads[j]))]  # fmt: skip
            if not rows:
                assert np.isnan(cos_TT[i, j])
                continue
            a, b = (torch.cat([grads[k][name].double().flatten() for name in rows]) for k in (i, j))
            assert cos_TT[i, j] == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5), part
            met += 1
    assert met > 20


def test_parts_by_modality_are_what_its_tokens_bring(tmp_path: Path) -> None:
    model, catalogue, batch = built(tiny_config(tmp_path, train={"steps": 1, "batch_size": 32}))
    with tapped(model) as taps:
        found = losses(model, catalogue, batch)
        whole = products(model, {**found, "sum": found["shapes"] + found["tones"]}, taps)
    part = Part(0, "expert", "shared")
    ffn = model.trunk.blocks[0].ffn
    network = ffn.shared["shared"]
    by_hand = {}
    for number in range(3):
        mask_S = (taps[0].modality_S == number)[:, None]
        handle = ffn.register_forward_hook(
            lambda _, args, out, mask=mask_S: (torch.where(mask, out[0], out[0].detach()), out[1])
        )
        own = losses(model, catalogue, batch)
        handle.remove()
        for task in ("shapes", "tones"):
            grads = torch.autograd.grad(own[task], list(network.parameters()), retain_graph=True, allow_unused=True)
            by_hand[number, task] = [torch.zeros(1) if one is None else one.double() for one in grads]
    same = whole[part].same_PMTT
    assert same is not None
    for (number, task), grads in by_hand.items():
        place = 0 if task == "shapes" else 1
        squares = [float((one * one).sum()) for one in grads]
        np.testing.assert_allclose(same[:, number, place, place], squares, rtol=1e-4, atol=1e-12)
    assert same[:, :, 0, 1].max() == 0.0, "the tasks have no modality in common"
    one = cosines([whole[part]])
    assert one.same_TT is not None and one.same_TT[0, 1] == 0.0 and one.cos_TT[0, 1] != 0.0
    assert abs(one.same_TT[0, 2]) > 0.1, "their sum has both"


def test_a_model_with_skills_and_a_dense_one(tmp_path: Path) -> None:
    groups = [{"kind": "shared", "width": 16}, {"kind": "modality", "width": 8, "tasks": ["tones"]},
              {"kind": "routed", "count": 2, "width": 8}]  # fmt: skip
    loaded = tiny_config(tmp_path, model={"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": groups}})
    found = seen(loaded)
    assert np.isnan(found[Part(0, "expert", "modality_tones")].cos_TT[0, 1])
    assert np.isfinite(found[Part(1, "expert", "shared")].cos_TT[0, 1])
    dense = replace(loaded, config=replace(loaded.config, model=replace(loaded.config.model, moe="dense")))
    found = seen(dense)
    assert np.isfinite(found[Part(1, "ffn")].cos_TT[0, 1])
    model, catalogue, _ = built(dense)
    told = propose(dense.config, model, catalogue, [{**entry(kind="ffn", name=""), "cos": -0.5, "same": 0.0}])
    assert told[0] == [] and "experts are for `sparse`" in told[1][0]["why"]


def entry(**changes: Any) -> dict[str, Any]:
    return {"layer": 0, "kind": "expert", "name": "shared", "title": "0 expert shared", "losses": ["a", "b"], **changes}


def series(cos: list[float], *, error: float = 0.01, batches: int = 16) -> dict[str, Any]:
    number = len(cos)
    return entry(cos=cos, error=[error] * number, batches=[batches] * number, same=[0.0] * number)


@pytest.mark.parametrize(
    ("one", "clear"),
    [
        (series([0.5, -0.1, -0.1, -0.1]), 3),
        (series([-0.1, 0.1, -0.1]), 2),
        (series([-0.1]), 1),
        (series([-0.1, -0.1, 0.1]), None),
        (series([0.1, 0.1, -0.1]), None),
        (series([-0.1, -0.1, -0.1], error=0.06), None),
        (series([-0.1, -0.1, -0.1], error=0.02, batches=2), None),
        ({**series([-0.1]), "error": [None]}, None),
        ({**series([-0.1]), "cos": [None]}, None),
        ({**series([-0.1]), "kind": "layer"}, None),
    ],
)
def test_a_conflict_lasts_when_it_is_sure_and_in_most_of_the_last(one: dict[str, Any], clear: int | None) -> None:
    found = lasting({"parts": [one]})
    assert [each["clear"] for each in found] == ([] if clear is None else [clear])
    assert not lasting({"parts": [one]}, least=0.2)


def test_many_places_that_are_looked_at_ask_for_more() -> None:
    one, quiet = series([-0.03] * 3), series([0.0] * 3)
    assert lasting({"parts": [one]}) and not lasting({"parts": [one, *[quiet] * 500]})


Built = Callable[..., "tuple[Config, Model, Catalogue]"]


@pytest.fixture
def tiny(tmp_path: Path) -> Built:
    def build(*groups: dict[str, Any], **more: Any) -> tuple[Config, Model, Catalogue]:
        model = {"dim": 16, "heads": 2, "layers": 2, "experts": {"groups": list(groups)}, **more}
        loaded = tiny_config(tmp_path, model=model)
        found, catalogue, _ = built(loaded)
        return loaded.config, found, catalogue

    return build


def atom_of(config: Config, model: Model, layer: int, name: str) -> Atom:
    return next(a for a in all_atoms(config, model) if a.layer == layer and a.part.name == name)


def shown(groups: list[ExpertGroupConfig]) -> list[tuple[Any, ...]]:
    return [(g.kind, g.width, g.count, g.modalities, g.tasks, g.layers, g.per_modality) for g in groups]


def test_splits_by_modality_touch_the_layer_alone(tiny: Built) -> None:
    config, model, _ = tiny(
        {"kind": "shared", "width": 16}, {"kind": "modality", "width": 8}, {"kind": "routed", "count": 4, "width": 8}
    )
    splits = [Split(atom_of(config, model, 1, name), "modality", ()) for name in ("shared", "routed")]
    after = separate(config, model, splits)
    assert shown(after.model.experts.groups) == [
        ("shared", 16, 1, None, None, "0", False),
        ("modality", 8, 1, None, None, "all", False),
        ("routed", 8, 4, None, None, "0", False),
        ("modality", 16, 1, None, None, "1", False),
        ("routed", 8, 2, None, None, "1", True),
    ]
    assert replace(after, model=config.model) == config
    built_again = build_model(after.model, specs=_specs(config), tasks=model.tasks)
    assert set(built_again.trunk.blocks[1].ffn.shared) == set() and len(built_again.trunk.blocks[0].ffn.shared) == 1


def _specs(config: Config) -> Any:
    return learn_modalities(load_config(Path(config.data.root) / "tiny.yaml"))[1]


def test_where_names_stand_all_are_named(tiny: Built) -> None:
    config, model, _ = tiny(
        {"kind": "shared", "width": 16},
        {"kind": "modality", "width": 8, "modalities": ["image", "series"], "id": "eyes"},
        {"kind": "modality", "width": 4},
    )
    eyes = Split(atom_of(config, model, 0, "eyes"), "modality", ())
    shared = Split(atom_of(config, model, 1, "shared"), "modality", ())
    after = separate(config, model, [eyes, shared]).model.experts.groups
    assert shown(after) == [
        ("shared", 16, 1, None, None, "0", False),
        ("modality", 8, 1, ["image", "series"], None, "1", False),
        ("modality", 4, 1, ["record"], None, "all", False),
        *[("modality", 16, 1, [name], None, "1", False) for name in ("image", "record", "series")],
        *[("modality", 8, 1, [name], None, "0", False) for name in ("image", "series")],
    ]
    again = replace(config, model=replace(config.model, experts=ExpertsConfig(groups=after)))
    assert len(all_atoms(again, build_model(again.model, specs=_specs(config), tasks=model.tasks))) == 1 + 1 + 2 + 5


def test_splits_by_task(tiny: Built) -> None:
    config, model, catalogue = tiny(
        {"kind": "shared", "width": 16}, {"kind": "modality", "width": 8}, {"kind": "routed", "count": 2, "width": 8}
    )
    conflict = {"losses": ["shapes", "tones"], "cos": -0.5, "same": -0.4}
    places = [("shared", "expert"), ("modality_image", "expert"), ("routed", "group"), ("routed_0", "expert")]
    conflicts = [entry(**conflict, kind=kind, name=name, title=name) for name, kind in places]
    splits, told = propose(config, model, catalogue, conflicts)
    assert [(one["title"], one["remedy"]) for one in told] == [
        ("shared", "task"), ("modality_image", "task"), ("routed", "task")
    ], "an expert of a group is split with the group"  # fmt: skip
    assert told[0]["why"] == "80% of it is within one modality"
    after = separate(config, model, splits).model.experts.groups
    tasks = (["shapes"], ["tones"])
    assert shown(after) == [
        ("shared", 16, 1, None, None, "1", False),
        ("modality", 8, 1, ["image"], None, "1", False),
        ("modality", 8, 1, ["record"], None, "all", False),
        ("modality", 8, 1, ["series"], None, "all", False),
        ("routed", 8, 2, None, None, "1", False),
        *[("modality", 16, 1, None, task, "0", False) for task in tasks],
        *[("modality", 8, 1, ["image"], task, "0", False) for task in tasks],
        *[("routed", 8, 1, None, task, "0", False) for task in tasks],
    ]


def test_what_experts_cannot_help(tiny: Built) -> None:
    config, model, catalogue = tiny(
        {"kind": "shared", "width": 16}, {"kind": "routed", "count": 2, "width": 8},
        {"kind": "lora", "base": "routed_0", "rank": 2},
    )  # fmt: skip
    conflict = {"losses": ["shapes", "tones"], "cos": -0.5, "same": -0.5}
    whys = {
        "attention": entry(**conflict, kind="attention", name="", title="attention"),
        "routed": entry(**conflict, kind="group", name="routed", title="routed"),
        "objective": entry(**{**conflict, "losses": ["shapes", "objective masked"]}, title="objective"),
    }
    splits, told = propose(config, model, catalogue, list(whys.values()))
    assert splits == [] and {one["remedy"] for one in told} == {None}
    assert [one["why"].split(";")[0] for one in told] == [
        "these are no experts", "a lora expert or its base, which stay as they are",
        "within each modality, and one of the losses is no task",
    ]  # fmt: skip
    alone = entry(**conflict, kind="expert", name="routed_1", title="routed_1")
    _, told = propose(config, model, catalogue, [alone])
    assert told[0]["remedy"] is None and "of the experts of routed, which are split together" in told[0]["why"]
    joint = replace(catalogue.tasks[1], drawn_with="shapes")
    together = replace(catalogue, tasks=(catalogue.tasks[0], joint))
    _, told = propose(config, model, together, [entry(**conflict)])
    assert told[0]["remedy"] is None and "labels that share each sample" in told[0]["why"]
    _, told = propose(config, model, together, [entry(**{**conflict, "same": -0.2})])
    assert told[0]["remedy"] == "modality" and told[0]["why"] == "60% of it is between modalities"


def test_one_loss_has_no_conflict(tmp_path: Path) -> None:
    loaded = opposed_config(tmp_path)
    catalogue, _ = learn_modalities(loaded)
    one = SimpleNamespace(config=loaded.config, catalogue=replace(catalogue, tasks=catalogue.tasks[:1]), folder="r")
    with pytest.raises(ConfigError, match="r has one loss, a: there is nothing"):
        losses_of(one)  # type: ignore[arg-type]
    masked = replace(loaded.config.objectives, masked=replace(loaded.config.objectives.masked, weight=1.0))
    one.config = replace(loaded.config, objectives=masked)
    assert losses_of(one) == ["a", "objective masked"]  # type: ignore[arg-type]
