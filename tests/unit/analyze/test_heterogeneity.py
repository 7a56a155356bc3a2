"""Heterogeneity measured on data whose families are known, and the configuration that comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import FAMILIES, NAMES, planted_config

from moemm.analyze import (
    Effort,
    agglomerate,
    cut,
    exchange_experts,
    largest_number,
    pairs_of,
    parameters,
    regroup,
    transfer_between,
)
from moemm.analyze.bits import bits, null_outputs
from moemm.analyze.matrix import Transfer
from moemm.config import LoadedConfig
from moemm.config.schema import ExpertGroupConfig, ExpertsConfig
from moemm.data.catalogue import Catalogue, TaskInfo
from moemm.errors import ConfigError, DataError
from moemm.modalities import ModalitySpec
from moemm.models import build_model
from moemm.testing.tiny import tiny_config
from moemm.train.setup import learn_modalities

Made = tuple[LoadedConfig, Catalogue, dict[str, ModalitySpec]]
UNITS = [(name,) for name in NAMES]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    loaded = planted_config(tmp_path_factory.mktemp("planted"))
    return (loaded, *learn_modalities(loaded))


@pytest.fixture(scope="module")
def measured(made: Made) -> Transfer:
    loaded, catalogue, specs = made
    effort = Effort(samples=256, source_passes=16, transfer_passes=4)
    return transfer_between(loaded.config, catalogue, specs, UNITS, effort=effort)


def test_the_families_are_found(measured: Transfer) -> None:
    assert cut(NAMES, agglomerate(NAMES, measured.distance()), 2) == FAMILIES


def test_rows_are_sources(measured: Transfer) -> None:
    """A trunk that has learned products can add; one that has learned to add knows no products."""
    to = dict(zip(((s, t) for s in NAMES for t in NAMES), measured.bits_ST.flatten().tolist(), strict=True))
    for one in "12":
        for other in "12":
            assert to[f"product_{one}", f"sum_{other}"] > to[f"sum_{other}", f"product_{one}"] + 0.3


def test_bits_are_those_of_the_labels(measured: Transfer) -> None:
    """Labels of two even classes hold one bit."""
    assert measured.bits_ST.diagonal().min() > 0.6 and measured.bits_ST.max() < 1.02


def test_it_is_a_function_of_data_and_configuration(made: Made) -> None:
    loaded, catalogue, specs = made
    effort = Effort(samples=32, source_passes=1, transfer_passes=1)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(transfer_between(loaded.config, catalogue, specs, UNITS[:2], effort=effort).bits_ST)
        assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(*found)


def test_a_source_is_not_changed_by_who_else_is_measured(made: Made) -> None:
    loaded, catalogue, specs = made
    effort = Effort(samples=32, source_passes=1, transfer_passes=1)
    three = transfer_between(loaded.config, catalogue, specs, UNITS[:3], effort=effort).bits_ST
    two = transfer_between(loaded.config, catalogue, specs, UNITS[1:3], effort=effort).bits_ST
    assert np.array_equal(three[1:, 1:], two)


def test_pairs(tmp_path: Path) -> None:
    loaded = tiny_config(tmp_path)
    catalogue, specs = learn_modalities(loaded)
    assert pairs_of(catalogue) == [("image", "record")]
    units = [("image",), ("image", "record"), ("series",)]
    effort = Effort(samples=16, source_passes=1, transfer_passes=1)
    found = transfer_between(loaded.config, catalogue, specs, units, effort=effort)
    assert found.names == ("image", "image+record", "series") and np.isfinite(found.bits_ST).all()
    with pytest.raises(DataError, match="no task has samples with image and series in both"):
        transfer_between(loaded.config, catalogue, specs, [("image", "series")], effort=effort)


def task_of(target: str, outputs: int) -> TaskInfo:
    return TaskInfo(
        name="t", file="t.h5", label="label", target=target, outputs=outputs, metric="m", modalities=("a",), sizes={}
    )


def test_bits_by_hand() -> None:
    four = task_of("classification", 4)
    assert bits(four, torch.zeros(3, 4), torch.tensor([0, 1, 2])) == pytest.approx(2.0)
    two = task_of("multilabel", 2)
    assert bits(two, torch.zeros(3, 2), torch.ones(3, 2)) == pytest.approx(1.0)
    line = task_of("regression", 1)
    wide, narrow = (bits(line, torch.full((4, 1), error), torch.zeros(4)) for error in (1.0, 0.25))
    assert wide - narrow == pytest.approx(2.0), "a quarter of the error: two bits"


def test_the_null_head_knows_the_frequencies_of_the_train_split() -> None:
    four = task_of("classification", 4)
    label = torch.tensor([0] * 49 + [1] * 49 + [2] * 24)
    constant_C = null_outputs(four, label)
    torch.testing.assert_close(constant_C.softmax(0), torch.tensor([50, 50, 25, 1]) / 126)
    two = task_of("multilabel", 2)
    constant_C = null_outputs(two, torch.tensor([[1, 0], [1, 0], [0, 0]]))
    torch.testing.assert_close(constant_C.sigmoid(), torch.tensor([3 / 5, 1 / 5]))
    assert null_outputs(task_of("regression", 1), torch.tensor([1.0, 3.0])).tolist() == [2.0]


def untrained(made: Made) -> SimpleNamespace:
    """What load_run gives, with experts of one family that differ little."""
    loaded, catalogue, specs = made
    torch.manual_seed(0)
    model = build_model(loaded.config.model, specs=specs, tasks=catalogue.tasks).eval()
    for task in catalogue.tasks:
        torch.nn.init.normal_(model.heads.linear[task.name].weight)
    for block in model.trunk.blocks:
        experts = dict(block.ffn.experts)
        for first, second in FAMILIES:
            for own, other in zip(*(experts[f"modality_{n}"].parameters() for n in (first, second)), strict=True):
                own.data.mul_(4)  # large enough to be seen
                other.data.copy_(own + 0.01 * torch.randn_like(own))
    return SimpleNamespace(config=loaded.config, catalogue=catalogue, specs=specs, model=model, folder=Path("runs/x"))


def test_experts_that_are_alike_are_exchanged_at_no_loss(made: Made) -> None:
    found, by_task = exchange_experts(untrained(made), samples=64)
    distance = np.abs(found.bits_ST)
    assert found.bits_ST.diagonal().tolist() == [0.0] * 4
    alike = [(0, 2), (2, 0), (1, 3), (3, 1)]
    others = [(s, t) for s in range(4) for t in range(4) if s != t and (s, t) not in alike]
    assert max(distance[pair] for pair in alike) < min(distance[pair] for pair in others)
    assert by_task["sum_1"]["sum_1"]["product_1"] == found.bits_ST[0, 1]


def test_exchange_needs_modality_experts(made: Made) -> None:
    run = untrained(made)
    config = replace(run.config.model, moe="dense")
    run.model = build_model(config, specs=run.specs, tasks=run.catalogue.tasks).eval()
    with pytest.raises(ConfigError, match="no modality experts to exchange"):
        exchange_experts(run, samples=8)


def test_regrouping_replaces_modality_experts_and_nothing_else(made: Made) -> None:
    loaded, catalogue, specs = made
    grouped = regroup(loaded.config, FAMILIES, NAMES)
    kinds = [(group.kind, group.modalities, group.width, group.id) for group in grouped.model.experts.groups]
    assert kinds == [
        ("shared", None, 8, None),
        ("modality", ["product_1", "product_2"], 16, "family_0"),
        ("modality", ["sum_1", "sum_2"], 16, "family_1"),
    ]
    assert replace(grouped, model=loaded.config.model) == loaded.config
    saved = parameters(loaded.config, specs, catalogue.tasks) - parameters(grouped, specs, catalogue.tasks)
    assert saved == 2 * 2 * 16 * 16, "two experts of two matrices less"


def test_what_was_shared_by_hand_follows_the_groups(made: Made) -> None:
    loaded, catalogue, specs = made
    model = replace(loaded.config.model, untie=["norms"], latents=2, share=[["product_1", "sum_1"]])
    config = replace(loaded.config, model=model)
    groups = [FAMILIES[0], ("sum_1",), ("sum_2",)]
    assert regroup(config, groups, NAMES).model.share == [["product_1", "product_2"]]
    size = parameters(regroup(config, groups, NAMES), specs, catalogue.tasks)
    assert largest_number(config, specs, catalogue.tasks, budget=size) == 3
    assert largest_number(config, specs, catalogue.tasks, budget=size - 1) == 2
    effort = Effort(samples=8, source_passes=1, transfer_passes=1)
    assert np.isfinite(transfer_between(config, catalogue, specs, UNITS[:2], effort=effort).bits_ST).all()


def test_the_budget_is_that_of_the_whole_model(made: Made) -> None:
    loaded, catalogue, specs = made
    sizes = [parameters(regroup(loaded.config, groups, NAMES), specs, catalogue.tasks) for groups in
             ([NAMES], [NAMES[:1], NAMES[1:]], [NAMES[:1], NAMES[1:2], NAMES[2:]], UNITS)]  # fmt: skip
    for number, size in enumerate(sizes, start=1):
        assert largest_number(loaded.config, specs, catalogue.tasks, budget=size) == number
    assert largest_number(loaded.config, specs, catalogue.tasks, budget=10 * sizes[-1]) == 4
    with pytest.raises(ConfigError, match=rf"has {sizes[0]:,} parameters; give at least"):
        largest_number(loaded.config, specs, catalogue.tasks, budget=sizes[0] - 1)


def with_groups(loaded: LoadedConfig, *groups: ExpertGroupConfig) -> LoadedConfig:
    model = replace(loaded.config.model, experts=ExpertsConfig(groups=list(groups)))
    return replace(loaded, config=replace(loaded.config, model=model))


def test_regrouping_without_modality_experts_is_refused(made: Made) -> None:
    loaded = with_groups(made[0], ExpertGroupConfig(kind="shared", width=8))
    with pytest.raises(ConfigError, match="has no group of kind modality"):
        regroup(loaded.config, FAMILIES, NAMES)


def test_an_expert_that_builds_on_one_that_goes_is_refused(made: Made) -> None:
    lora = ExpertGroupConfig(kind="lora", base="modality_sum_1", rank=2)
    loaded = with_groups(made[0], ExpertGroupConfig(kind="modality", width=16), lora)
    with pytest.raises(ConfigError, match="has base modality_sum_1, which is no expert"):
        regroup(loaded.config, FAMILIES, NAMES)


def test_the_matrix_as_csv(tmp_path: Path, measured: Transfer) -> None:
    measured.write_csv(tmp_path / "m.csv")
    head, *lines = [line.split(",") for line in (tmp_path / "m.csv").read_text().splitlines()]
    assert head[1:] == list(NAMES) == [line[0] for line in lines]
    np.testing.assert_allclose(np.array([line[1:] for line in lines], float), measured.bits_ST, atol=1e-6)
