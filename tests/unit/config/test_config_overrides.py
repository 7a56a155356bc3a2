"""Values from the command line, and the layers below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moemm.config import load_config
from moemm.config.overrides import split_overrides
from moemm.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["--model.dim", "128"], "model.dim", 128),
        (["--model.dim=128"], "model.dim", 128),
        (["model.dim=128", "train.seed=1"], "model.dim", 128),
        (["--model.router.top-k", "2"], "model.router.top_k", 2),
        (["--train.lr", "3e-4"], "train.lr", 3e-4),
        (["--train.weight-decay=0"], "train.weight_decay", 0.0),
        (["--train.deterministic", "false"], "train.deterministic", False),
        (["--train.output", "2024"], "train.output", "2024"),
        (["--name", "true"], "name", "true"),
        (["--train.betas", "[0.8, 0.9]"], "train.betas", (0.8, 0.9)),
        (["--data.tasks.0.weight", "2"], "data.tasks.0.weight", 2.0),
        (["--data.tasks.adult.weight", "2"], "data.tasks.1.weight", 2.0),
        (["--data.tasks.1.rename.a-b", "text"], "data.tasks.1.rename", {"a-b": "text"}),
        (["--modalities.image.patch", "[2, 2]"], "modalities.image.patch", [2, 2]),
        (["--modalities.sound.noise", "0.1"], "modalities.sound.noise", 0.1),
        (["--modalities.image.kind", "null"], "modalities.image.kind", None),
        (["--modalities.image", "{dropout: 0.5}"], "modalities.image.patch", [4, 4]),
        (["--deepspeed.zero-stage", "2"], "deepspeed.zero_stage", 2),
        (["--deepspeed.extra.zero_optimization.overlap_comm", "true", "--deepspeed.zero_stage=1"],
         "deepspeed.extra", {"zero_optimization": {"overlap_comm": True}}),
        (["--model.dim", "16", "--model.dim", "32"], "model.dim", 32),
        (["--train.steps", "7"], "train.epochs", None),
        (["--train.steps", "7"], "train.steps", 7),
    ],
)  # fmt: skip
def test_override(overrides: list[str], path: str, value: object, recipe: Path) -> None:
    found: object = load_config(recipe, overrides).config
    for key in path.split("."):
        if isinstance(found, list | dict):
            found = found[int(key) if isinstance(found, list) else key]
        else:
            found = getattr(found, key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--modle.dim", "1"], r"modle: unknown key; did you mean model\?"),
        (["--model.dmi", "1"], r"model\.dmi: unknown key; did you mean model\.dim\?"),
        (["--model.top_k", "1"], r"did you mean model\.router\.top_k\?"),
        (["--model.dim"], r"--model\.dim needs a value\n.*\n    allowed: a whole number >= 8"),
        (["--model.dim", "--train.lr", "1"], r"--model\.dim needs a value"),
        (["--model.dim", "wide"], r"model\.dim: has the wrong type\n    given:   \"wide\" \(command line --model"),
        (["--model.dim.x", "1"], r"model\.dim is a single value"),
        (["--data.tasks.adlut.weight", "1"], r"no such entry; did you mean adult\?\n.*\n.*names digits, adult, or 0"),
        (["--data.tasks.2.weight", "1"], r"data\.tasks has no such entry"),
        (["--data.tasks.-1.weight", "1"], r"data\.tasks has no such entry"),
        (["--train.lr", "-1"], r"train\.lr: is out of range\n    given:   -1 \(command line --train\.lr\)"),
        (["--train.betas", "[0.9"], r"train\.betas: .*is not YAML"),
        (["--train.betas", "!!python/name:os.system"], r"is not allowed"),
        (["--model", "3"], r"model: has the wrong type"),
        (["--model..dim", "3"], r"model\.: unknown key"),
        (["dim=3"], r"'--dim=3' is no override; write --KEY VALUE"),
        (["--dim", "3"], r"'--dim' is no override"),
        (["--train.steps", "7", "--train.epochs", "1"], r"given together with train\.epochs"),
    ],
)
def test_refused(overrides: list[str], message: str, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, overrides)


def test_problems_of_file_and_command_line_come_together(write) -> None:  # type: ignore[no-untyped-def]
    path = write("data: {tasks: [{name: a, file: b}]}\ntrain: {epochs: 1, lr: no}\nmodle: {}\n")
    with pytest.raises(ConfigError, match="4 problems") as caught:
        load_config(path, ["--model.dmi", "3", "--model.heads", "5.5"])
    for place in (f"{path}:2", f"{path}:3", "command line --model.dmi", "command line --model.heads"):
        assert place in str(caught.value)


def test_split() -> None:
    overrides = ["--model.dim", "128", "--train.seed=1", "--train.min_lr", "-1", "--name", "x"]
    assert split_overrides(["a.yaml", "--resume", *overrides, "--json"]) == (
        ["a.yaml", "--resume", "--json"],
        overrides,
    )
    assert split_overrides(["--", "--model.dim"]) == (["--", "--model.dim"], [])
    own = ["run", "--data", "x.h5", "--train.steps", "3"]
    assert split_overrides(own, ["--data"]) == (["run", "--data", "x.h5"], ["--train.steps", "3"])
