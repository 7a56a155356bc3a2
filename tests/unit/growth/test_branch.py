"""Branch-train-mix: runs on data of their own -> experts of one model on all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from growth_cases import DENSE, trained

from moemm.config import load_config
from moemm.errors import CheckpointError, ConfigError
from moemm.growth import Receipt, Wanted, upcycle
from moemm.train import load_run


def mixed(target: Path, *runs: Path, **wanted: Any) -> Receipt:
    return upcycle(runs, Wanted(method="branch", output=target, **wanted), tell=lambda line: None)


@pytest.fixture(scope="module")
def branches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs that began with one seed run, each on one task of the two; one of them scores the other task, too."""
    folder = tmp_path_factory.mktemp("branches")
    seed = trained(folder, model=DENSE, data={"root": "."})  # relative, as in most configurations
    made = []
    shapes, tones = ({"name": name, "file": f"{name}.h5"} for name in ("shapes", "tones"))
    for task, tasks in (("shapes", [shapes]), ("tones", [{**shapes, "learn": False}, tones])):
        data = {"root": ".", "num_workers": 0, "tasks": tasks}
        train = {"output": str(folder / task), "init": str(seed), "steps": 4, "batch_size": 8}
        made.append(trained(folder, model=DENSE, data=data, train=train))
    return made[0], made[1]


def test_each_run_is_an_expert_and_the_rest_is_the_mean(branches: tuple[Path, Path], tmp_path: Path) -> None:
    receipt = mixed(tmp_path / "out", *branches)
    shapes, tones, both = (load_run(folder).model.state_dict() for folder in (*branches, tmp_path / "out"))
    for number, source in enumerate((shapes, tones)):
        expert = both[f"trunk.blocks.1.ffn.experts.routed_{number}.w1_FD"]
        assert torch.equal(expert, source["trunk.blocks.1.ffn.shared.shared.w1_FD"])
    name = "trunk.blocks.0.attention.qkv.weight"
    torch.testing.assert_close(both[name], (shapes[name] + tones[name]) / 2)
    assert not torch.equal(both[name], shapes[name]), "they were trained apart"
    only = "tokenizers.series.project.weight"
    assert only not in shapes and torch.equal(both[only], tones[only])
    query = "heads.pool.query.tones"
    assert query not in shapes and torch.equal(both[query], tones[query])
    assert receipt.ok and len(receipt.sources) == 2
    config = load_config(tmp_path / "out" / "config.yaml").config
    assert (config.model.router.top_k, config.model.router.gates) == (2, "renormalised")
    assert [(task.name, task.learn) for task in config.data.tasks] == [("shapes", True), ("tones", True)]


def test_runs_that_are_one_give_what_it_computes(branches: tuple[Path, Path], tmp_path: Path) -> None:
    receipt = mixed(tmp_path / "out", branches[0], branches[0], branches[0], top_k=1)
    assert receipt.proofs[0].value <= 1e-5
    config = load_config(tmp_path / "out" / "config.yaml").config
    assert [task.name for task in config.data.tasks] == ["shapes"] and config.model.experts.groups[0].count == 3


def test_runs_that_are_not_alike_are_refused(branches: tuple[Path, Path], tmp_path: Path) -> None:
    other = trained(tmp_path, model={**DENSE, "dim": 32})
    with pytest.raises(ConfigError, match="differ in their section `model`"):
        mixed(tmp_path / "out", branches[0], other)
    with pytest.raises(ConfigError, match="--top-k 3: there are 2 experts"):
        mixed(tmp_path / "out", *branches, top_k=3)
    with pytest.raises(CheckpointError, match="no such run folder"):
        mixed(tmp_path / "out", branches[0], tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_modalities_that_mean_other_things_are_refused(branches: tuple[Path, Path], tmp_path: Path) -> None:
    """Same names, other data: the statistics differ, and so does what a tokenizer's weights mean."""
    data = tmp_path / "data"
    data.mkdir()
    from moemm.testing.tiny import write_tiny_data

    write_tiny_data(data, seed=5)
    task = {"name": "more_shapes", "file": "shapes.h5"}
    run = trained(data, model=DENSE, data={"root": str(data), "num_workers": 0, "tasks": [task]})
    with pytest.raises(ConfigError, match="modality image has another tokenizer or statistics"):
        mixed(tmp_path / "out", branches[0], run)
    same_name = {"name": "shapes", "file": "shapes.h5"}
    section = {"root": str(data), "num_workers": 0, "tasks": [same_name]}
    train = {"output": str(tmp_path / "run2"), "steps": 1, "batch_size": 8}
    run = trained(data, model=DENSE, data=section, train=train)
    with pytest.raises(ConfigError, match="task shapes is another one"):
        mixed(tmp_path / "out", branches[0], run)
