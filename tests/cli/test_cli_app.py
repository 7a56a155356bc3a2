"""Verbs, messages and exit codes, as a user meets them."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml

from moemm import errors
from moemm.cli import app
from moemm.cli.verbs import VERBS
from moemm.config.schema import Config
from moemm.data import DataFile
from moemm.errors import DataError

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


def test_help_lists_every_verb_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"moemm {name} " in text for name in VERBS)
    assert max(map(len, text.splitlines())) <= 100
    assert app.main([]) == 0 and capsys.readouterr().out == text


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([*name.split(), "--help"]) == 0
    assert f"usage: moemm {name}" in capsys.readouterr().out


def test_a_verb_may_have_others_behind_it() -> None:
    assert app._find(["extend", "run", "--data", "x.h5"]) == ("extend", ["run", "--data", "x.h5"])
    assert app._find(["extend", "check", "run"]) == ("extend check", ["run"])
    assert app._find(["extend", "./check"]) == ("extend", ["./check"]), "a folder of that name"
    assert app._find(["extend"]) == ("extend", [])


def test_groups_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["config"]) == app.main(["data", "--help"]) == 0
    text = capsys.readouterr().out
    assert "moemm config show CONFIG" in text and "moemm data validate FILE..." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "a.yaml"], "moemm has no verb 'trian'; did you mean train?"),
        (["config", "shwo"], "moemm config has no verb 'shwo'; did you mean show?"),
        (["xyzzy"], f"verbs: {', '.join(sorted({name.split()[0] for name in VERBS}))}\n"),
        (["train", "a.yaml", "--resmue"], "moemm train has no option --resmue; did you mean --resume?"),
        (["train", "a.yaml", "--dim", "3"], "moemm train has no option --dim; did you mean --model.dim?"),
        (["evaluate", "run", "--model.dim", "3"], "moemm evaluate has no option --model.dim"),
        (["config", "explain", "model.topk"], "did you mean model.router.top_k?"),
        (["config", "show", "nowhere.yaml"], "nowhere.yaml: no such config file"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["train"], ["evaluate"], ["config", "show"], ["evaluate", "r", "--split", "tset"]]
)
def test_missing_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(arguments) == 2
    assert capsys.readouterr().err


def test_missing_run_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["evaluate", "no_such_run"]) == 4
    assert app.main(["data", "inspect", "no_such.h5"]) == 3
    assert app.main(["data", "validate"]) == 3
    assert app.main(["data", "validate", "no_such.h5", "nor_this.h5"]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 3 and captured.out.count("refused") == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--version"]) == 0
    assert re.fullmatch(r"moemm \d+\.\d+.*\n", capsys.readouterr().out)


class Raising:
    """A verb that fails in a given way."""

    def __init__(self, error: BaseException):
        self.error = error

    def __call__(self, *arguments: object) -> int:
        raise self.error


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_exit_codes(kind: type[errors.MoemmError], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(app, "_dispatch", Raising(kind("what was wrong")))
    assert app.main(["train"]) == kind.exit_code
    assert capsys.readouterr().err == "error: what was wrong\n"
    monkeypatch.setenv("MOEMM_TRACEBACK", "1")
    app.main(["train"])
    assert "Traceback" in capsys.readouterr().err


def test_ranks_sign_their_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(app, "_dispatch", Raising(errors.DataError("broken")))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    app.main(["train"])
    assert capsys.readouterr().err == "[rank 1] error: broken\n"


def test_data_repack_writes_a_new_file_and_never_over_one(tmp_path: Path, capsys: Capture) -> None:
    old, new = ROOT / "data" / "quickstart" / "vowels.h5", tmp_path / "new.h5"
    assert app.main(["data", "repack", str(old), str(new)]) == 0
    assert " samples, " in capsys.readouterr().out
    with DataFile(old) as before, DataFile(new) as after:
        assert len(before) == len(after) and np.array_equal(before.targets(), after.targets())
        for index in (0, len(before) - 1):
            assert all(np.array_equal(value, after.read(name, index)) for name, value in before.sample(index).items())
    written = new.read_bytes()
    assert app.main(["data", "repack", str(old), str(new)]) == DataError.exit_code
    assert "is there already" in capsys.readouterr().err and new.read_bytes() == written
    assert app.main(["data", "repack", str(tmp_path / "none.h5"), str(tmp_path / "other.h5")]) == DataError.exit_code
    assert "none.h5" in capsys.readouterr().err and not (tmp_path / "other.h5").exists()


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_dispatch", Raising(KeyboardInterrupt()))
    assert app.main(["train"]) == 130


@pytest.mark.parametrize("front", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_train_gets_configuration_and_overrides(
    front: list[str], recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("moemm.train.lean")  # the command asks for it, too, and a fake has no modules of its own
    seen = {}
    fake = types.ModuleType("moemm.train")

    def train(loaded: object, *, resume: bool, extra_callbacks: object) -> dict[str, object]:
        seen.update(loaded=loaded, resume=resume)
        return {"exit_code": 5}

    monkeypatch.setattr(fake, "train", train, raising=False)
    monkeypatch.setitem(sys.modules, "moemm.train", fake)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert app.main([*front, "train", str(recipe), "--resume", "--model.dim", "128", "--train.steps=3"]) == 5
    assert seen["resume"] is True
    assert seen["loaded"].config.model.dim == 128 and seen["loaded"].config.train.steps == 3
    assert app.os.environ["LOCAL_RANK"] == "1"
    monkeypatch.delenv("LOCAL_RANK")


def test_evaluate_gets_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    fake = types.ModuleType("moemm.evaluate")
    calls = []

    def evaluate_run(run: str, *, split: str, missing: tuple[str, ...]) -> dict[str, object]:
        calls.append((run, split, missing))
        return {"digits": 0.5}

    monkeypatch.setattr(fake, "evaluate_run", evaluate_run, raising=False)
    monkeypatch.setattr(fake, "render", lambda result: f"a table of {result}", raising=False)
    monkeypatch.setattr(fake, "load_run", lambda path, plugins: f"the run in {path}", raising=False)
    monkeypatch.setitem(sys.modules, "moemm.evaluate", fake)
    monkeypatch.setitem(sys.modules, "moemm.train", fake)
    assert app.main(["evaluate", str(tmp_path), "--split", "val", "--missing", "image, text", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"digits": 0.5}
    assert app.main(["evaluate", str(tmp_path)]) == 0
    assert "a table of" in capsys.readouterr().out
    run = f"the run in {tmp_path}"
    assert calls == [(run, "val", ("image", "text")), (run, "test", ())]


def test_config_show(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["config", "show", str(recipe), "--model.dim", "128"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\n  dim: 128 +# command line --model\.dim\n", text)
    assert re.search(r"\n  layers: 2 +# default\n", text)
    assert yaml.safe_load(text)["data"]["tasks"][0]["modalities"] == ["image"]
    assert app.main(["config", "show", str(recipe), "--for-deepspeed", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["train_micro_batch_size_per_gpu"] == 32


def test_config_show_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "configs" / "recipes" / "quickstart.yaml"
    assert app.main(["config", "show", str(recipe), "--model.dim", "128"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"\n  dim: 128 +# command line --model\.dim\n", text)
    assert f"# {recipe}:" in text and "# default" in text
    assert {field.name for field in fields(Config)} == set(yaml.safe_load(text))


def test_config_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["config", "explain", "model.router.top_k"]) == 0
    assert "a whole number >= 1" in capsys.readouterr().out
    assert app.main(["config", "explain"]) == 0
    assert "train.checkpoint.keep" in capsys.readouterr().out
    assert app.main(["config", "explain", "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# Configuration")
