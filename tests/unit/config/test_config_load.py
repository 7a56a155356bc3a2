"""Base files, origins, what is written and read back, and the hash."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moemm.config import config_hash, from_dict, load_config, save_config, show, to_dict, to_yaml
from moemm.errors import ConfigError

Write = Callable[..., Path]
SMALL = "model:\n  dim: 32\n  heads: 4\n"
TASKS = "data:\n  root: ../files\n  tasks:\n    - {name: a, file: a.h5}\n"


def test_a_recipe_builds_on_bases(write: Write, tmp_path: Path) -> None:
    write(SMALL, "base/small.yaml")
    write(f"base: small.yaml\n{TASKS}train: {{epochs: 4, lr: 0.5}}\n", "base/tasks.yaml")
    path = write("base: ../base/tasks.yaml\nmodel: {dim: 64}\ntrain: {steps: 3}\n", "recipes/r.yaml")
    loaded = load_config(path, ["--train.seed", "3"])
    assert (loaded.config.model.dim, loaded.config.model.heads, loaded.config.train.lr) == (64, 4, 0.5)
    assert (loaded.config.train.steps, loaded.config.train.epochs) == (3, None)
    assert loaded.origins["model", "dim"] == f"{path}:2"
    assert loaded.origins["model", "heads"] == f"{tmp_path}/base/small.yaml:3"
    assert loaded.origins["train", "seed"] == "command line --train.seed"
    assert loaded.data_root.resolve() == tmp_path / "files"
    assert "base" not in loaded.source


def test_later_bases_win(write: Write) -> None:
    write("model: {dim: 32}\ntrain: {epochs: 1}\n", "a.yaml")
    write("model: {dim: 64}\n", "b.yaml")
    path = write(f"base: [a.yaml, b.yaml]\n{TASKS}")
    assert load_config(path).config.model.dim == 64


def test_a_root_starts_at_the_file_that_names_it(write: Write, tmp_path: Path) -> None:
    write(TASKS, "deep/down/base.yaml")
    path = write("base: deep/down/base.yaml\ntrain: {epochs: 1}\n")
    assert load_config(path).data_root.resolve() == tmp_path / "deep/files"
    write("data: {tasks: [{name: a, file: a.h5}]}\n", "deep/down/base.yaml")
    assert load_config(path).data_root.resolve() == tmp_path / "deep/down"


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("base: recipe.yaml\n", "builds on itself through `base`: recipe.yaml -> recipe.yaml"),
        ("base: other.yaml\n", "builds on itself through `base`: recipe.yaml -> other.yaml -> recipe.yaml"),
        ("base: nowhere.yaml\n", "nowhere.yaml: no such config file"),
        ("base: 3\n", "base: must name a YAML file"),
        ("base: [other.yaml, 3]\n", "base: must name a YAML file"),
        ("base: {a: b}\n", "base: must name a YAML file"),
    ],
)
def test_bases_that_are_refused(first: str, message: str, write: Write) -> None:
    write("base: recipe.yaml\n", "other.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(write(f"{first}{TASKS}"))


def test_too_many_bases(write: Write) -> None:
    for index in range(12):
        write(f"base: {index + 1}.yaml\n", f"{index}.yaml")
    with pytest.raises(ConfigError, match="more than 8 files"):
        load_config(write("base: 0.yaml\n"))


def test_errors_in_a_base_name_its_line(write: Write) -> None:
    base = write("model:\n  dim: wide\n  dim: 3\n", "base.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(write(f"base: base.yaml\n{TASKS}train: {{epochs: 1}}\n"))
    assert f"{base}:3" in str(caught.value)


def test_dict_round_trip(recipe: Path) -> None:
    config = load_config(recipe).config
    assert from_dict(to_dict(config), origin="a test") == config
    assert from_dict(yaml.safe_load(to_yaml(config)), origin="a test") == config


def test_show_can_be_loaded_again(recipe: Path, write: Write) -> None:
    loaded = load_config(recipe, ["--model.dim", "128", "--train.lr", "1e-5"])
    text = show(loaded)
    assert re.search(r"\n  dim: 128 +# command line --model\.dim\n", text)
    assert f"# {recipe}:" in text and re.search(r"\n  layers: 2 +# default\n", text)
    assert load_config(write(text, "again.yaml")).config == loaded.config


TRICKY = [
    *("yes", "off", "null", "3", "1e5", ".inf", ".5", ".1e3", ".", "nan", "0x1F", "1_0", "2020-01-01", "~", "", " x "),
    *(
        "a: b",
        "a, b",
        "# no",
        "- a",
        "'",
        '"',
        "!x",
        "*a",
        "{a}",
        "../a-b/c.h5",
        "/x",
        "a\nb",
        "\u2028",
        "\x85",
        "\x7f",
    ),
    *("é", "😀"),
]


@pytest.mark.parametrize("text", TRICKY)
def test_text_survives_writing_and_reading(text: str, values: dict[str, Any], write: Write) -> None:
    values["data"]["tasks"][0]["rename"] = {text: "image"}
    values["data"]["tasks"][0]["file"] = text or "x"
    config = from_dict(values, origin="a test")
    assert load_config(write(to_yaml(config))).config == config


def test_saved_config_finds_the_data_from_where_it_lies(recipe: Path, tmp_path: Path) -> None:
    loaded = load_config(recipe, ["--data.root", "files"])
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    save_config(loaded, run / "config.yaml")
    again = load_config(run / "config.yaml")
    assert again.data_root.resolve() == loaded.data_root.resolve() == tmp_path / "files"
    assert config_hash(again.config) == config_hash(loaded.config)


def test_an_absolute_root_stays(recipe: Path, tmp_path: Path) -> None:
    loaded = load_config(recipe, ["--data.root", "/somewhere"])
    save_config(loaded, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml").config.data.root == "/somewhere"
    assert os.fspath(loaded.data_root) == "/somewhere"


def test_hash(values: dict[str, Any]) -> None:
    def hash_of(section: str, key: str, value: object) -> str:
        changed = copy.deepcopy(values)
        changed.setdefault(section, {})[key] = value
        return config_hash(from_dict(changed, origin="a test"))

    plain = config_hash(from_dict(values, origin="a test"))
    assert len(plain) == 12 and int(plain, 16) >= 0
    assert hash_of("train", "output", "elsewhere") == plain == hash_of("data", "root", "/elsewhere")
    assert hash_of("train", "seed", 1) != plain != hash_of("model", "dim", 128)


def test_from_dict_leaves_its_argument_alone(values: dict[str, Any]) -> None:
    before = copy.deepcopy(values)
    from_dict(values, origin="a test")
    assert values == before
