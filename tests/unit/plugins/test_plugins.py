"""Files of the user's own: what they add, what is refused, and whose code runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moemm
from moemm import plugins
from moemm.cli.app import main
from moemm.config import LoadedConfig, config_hash, load_config
from moemm.errors import CheckpointError, ConfigError
from moemm.harmonize import HARMONIZERS
from moemm.modalities import KINDS
from moemm.moe import ROUTERS
from moemm.objectives import OBJECTIVES
from moemm.testing.tiny import tiny_config
from moemm.train import load_outline, load_run, train

ROOT = Path(__file__).parents[3]
KIND = """
import os
import moemm
from moemm.modalities.timeseries import TimeSeries

def halve(value):
    {worker}
    return value / 2

@moemm.register_modality("{name}")
class Own(TimeSeries):
    defaults = {{**TimeSeries.defaults, "patch": [4], "factor": 2.0}}

    @classmethod
    def prepare(cls, spec):
        return halve
"""
ROUTER = """
import moemm
@moemm.register_router("own_router")
def own(given):
    from moemm.moe.routers import softmax
    return softmax(given)
"""
HARMONIZER = """
import moemm
@moemm.register_harmonizer("own_harmonizer")
def own(gram_XTT, context):
    return gram_XTT.new_ones(gram_XTT.shape[:2])
"""
OBJECTIVE = """
import moemm
from moemm.objectives import Objective
from moemm.objectives.content import mean_over_samples

@moemm.register_objective("small")
class Small(Objective):
    views = ("clean",)

    def __init__(self, config, shapes, dim):
        super().__init__(config, shapes, dim)
        self.power = config.options["power"]

    def forward(self, scene):
        loss_T = (scene.x["clean"].float().abs() ** self.power).mean(1)
        stream, shape = scene.content.stream, scene.content.present_BM.shape
        return mean_over_samples(loss_T, stream.sample_T * shape[1] + stream.modality_T, shape)
"""


LACKS = """import moemm
from moemm.modalities import Tokenizer

@moemm.register_modality("x")
class A(Tokenizer):
    pass
"""


def kind(name: str = "own", worker: str = "pass") -> str:
    return KIND.format(name=name, worker=worker)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def config(folder: Path, **sections: Any) -> LoadedConfig:
    """tiny.yaml in `folder`, whose series are of kind `own` and which names own.py."""
    write(folder / "own.py", sections.pop("code", kind()))
    names = sections.pop("plugins", ["own.py"])
    sections = {"modalities": {"series": {"kind": "own"}}, "train": {"steps": 2, "baselines": False}, **sections}
    loaded = tiny_config(folder, **{**sections, "train": {"output": str(folder / "run"), **sections["train"]}})
    values = yaml.safe_load(loaded.path.read_text())
    loaded.path.write_text(yaml.safe_dump({**values, "plugins": names}))
    return load_config(loaded.path)


def names() -> list[set[str]]:
    return [set(registry) for registry in (KINDS, ROUTERS, HARMONIZERS, OBJECTIVES)]


# What is refused


@pytest.mark.parametrize(
    ("code", "line", "told"),
    [
        (kind() + "\n1 / 0\n", 18, "ZeroDivisionError: division by zero"),
        (kind() + "\nimport no_such_package\n", 18, "ModuleNotFoundError: No module named 'no_such_package'"),
        (kind() + "\nraise SystemExit(3)\n", 18, "SystemExit: 3"),
        (kind() + "\ndef broken(:\n", 18, "SyntaxError"),
        (kind() + "\ndef f():\n    return int('x')\nf()\n", 19, "ValueError: invalid literal"),
        (kind() + ROUTER.replace("own_router", "softmax"), 19, "ConfigError: router 'softmax' is registered twice"),
        (kind("image"), 10, "modality kind 'image' is registered by both"),
        (kind("features"), 10, "modality kind 'features' is registered by both"),
        ("import moemm\n@moemm.register_modality('x')\ndef f(): pass\n", 2, "is no subclass of moemm.modalities."),
        (LACKS, 4, "A does not define forward"),
        ("import moemm\n@moemm.register_modality()\nclass A: pass\n", 2, "no kind is given"),
    ],
)  # fmt: skip
def test_a_file_that_raises_is_told_by_line_and_leaves_nothing(tmp_path: Path, code: str, line: int, told: str) -> None:
    before, path = names(), write(tmp_path / "bad.py", code)
    with pytest.raises(ConfigError, match=rf"{re.escape(f'{path}:{line}')} raised .*{re.escape(told)}"):
        moemm.load_plugin(path)
    assert names() == before
    assert not any(name.startswith("moemm_plugin_bad") for name in sys.modules)
    assert not plugins._known()


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("nothing.py", "x = 1\n", "registers nothing"), ("empty.py", "", "registers nothing"),
        ("own.txt", kind(), "no Python file"), ("zero.py", "\0", "raised SyntaxError"),
        ("large.py", "#" * (plugins.MAX_BYTES + 1), "allowed: 1048576"),
    ],
)  # fmt: skip
def test_files_that_are_no_plugins(tmp_path: Path, name: str, code: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        moemm.load_plugin(write(tmp_path / name, code))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "events.py", kind())
    with pytest.raises(ConfigError, match=r"no such plugin file(.|\n)*did you mean .*events.py"):
        moemm.load_plugin(tmp_path / "event.py")
    with pytest.raises(ConfigError, match="is no Python file"):
        moemm.load_plugin(tmp_path)


def test_two_files_cannot_share_a_kind(tmp_path: Path) -> None:
    moemm.load_plugin(write(tmp_path / "a.py", kind()))
    first = KINDS["own"]
    with pytest.raises(ConfigError, match=r"b\.py:10 raised ConfigError: modality kind 'own' is registered by both"):
        moemm.load_plugin(write(tmp_path / "b.py", "# another\n" + kind()[1:]))
    assert KINDS["own"] is first


def test_a_changed_file_replaces_itself_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.py", kind())
    assert moemm.load_plugin(path) is moemm.load_plugin(path)
    first = KINDS["own"]
    assert moemm.load_plugin(write(path, kind("other"))).registered == (("modality", "other"),)
    assert "own" not in KINDS
    with pytest.raises(ConfigError):
        moemm.load_plugin(write(path, kind() + "\n1 / 0"))
    assert "own" not in KINDS and "other" in KINDS
    moemm.load_plugin(write(path, kind()))
    assert KINDS["own"] is not first and "other" not in KINDS


# The configuration


def test_paths_start_at_the_file_that_they_stand_in(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(
        tmp_path / "base" / "base.yaml",
        "plugins: [own.py]\ndata: {tasks: [{name: a, file: a.h5}]}\ntrain: {steps: 1}\n",
    )
    loaded = load_config(write(tmp_path / "top.yaml", "base: base/base.yaml\n"))
    assert loaded.plugin_files == [tmp_path / "base" / "own.py"]
    absolute = load_config(tmp_path / "top.yaml", [f"--plugins=[{tmp_path}/x.py]"])
    assert absolute.plugin_files == [tmp_path / "x.py"]
    assert config_hash(absolute.config) == config_hash(loaded.config), "where code lies is no part of the experiment"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"modalities": {"series": {"kind": "own", "options": {"nope": 1}}}}, "options.nope: a modality of kind 'own'"),
        ({"modalities": {"series": {"kind": "own", "options": {"factor": "x"}}}}, "is 'x'; allowed: float"),
        ({"modalities": {"series": {"kind": "own", "options": {"patch": [2]}}}}, "write modalities.series.patch"),
        ({"modalities": {"series": {"kind": "sensor", "options": {"factor": 1}}}}, "is no option of kind sensor"),
        ({"modalities": {"series": {"kind": "onw"}}}, "'onw' is not known \\(nearest: own\\)"),
        ({"objectives": {"own": {"masked": {"weight": 1.0}}}}, "ships with moemm"),
        ({"objectives": {"own": {"a.b": {"weight": 1.0}}}}, "is no name of an objective"),
        ({"objectives": {"own": {"mine": {"weight": 1.0, "over": 0.5}}}}, "objectives.own.mine.over"),
        ({"objectives": {"own": {"mine": {"weight": 1.0}}}}, "objectives.own.mine: no objective of this name"),
        ({"model": {"router": {"kind": "mine"}}}, "model.router.kind is mine; known are"),
        ({"harmonize": {"method": "mine"}, "objectives": {"masked": {"weight": 1.0}, "similarity": {"weight": 1.0}}},
         "no harmonizer 'mine'"),
    ],
)  # fmt: skip
def test_options_and_names_are_checked(tmp_path: Path, values: dict[str, Any], told: str, alone: None) -> None:
    with pytest.raises(ConfigError, match=told):
        train(config(tmp_path, **values))


# What it adds


def test_a_run_with_everything_of_ones_own(tmp_path: Path, alone: None) -> None:
    """A modality whose values workers prepare, a router, a harmonizer and an objective, trained and loaded."""
    note = tmp_path / "workers"
    code = kind(worker=f"open({str(note)!r}, 'a').write(f'{{os.getpid()}}\\n')") + ROUTER + HARMONIZER
    write(tmp_path / "objective.py", OBJECTIVE)
    loaded = config(
        tmp_path, code=code, plugins=["own.py", "objective.py"],
        modalities={"series": {"kind": "own", "options": {"factor": 3}}},
        model={"router": {"kind": "own_router"}, "dim": 16, "heads": 2},
        harmonize={"method": "own_harmonizer", "at": "trunk"},
        objectives={"own": {"small": {"weight": 0.5, "options": {"power": 2}}}},
        data={"num_workers": 1, "root": str(tmp_path),
              "tasks": [{"name": "shapes", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5"}]},
    )  # fmt: skip
    train(loaded)
    assert {int(line) for line in note.read_text().split()} - {os.getpid()}, "a worker process ran `prepare`"
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(event for event in events if event["event"] == "train")["objectives"]["small"] > 0
    run = load_run(tmp_path / "run")
    assert run.specs["series"].kind == "own" and run.specs["series"].options["factor"] == 3
    assert type(run.model.tokenizers["series"]).__name__ == "Own"
    assert pickle.loads(pickle.dumps(KINDS["own"].prepare(run.specs["series"])))(4.0) == 2.0


# Whose code runs


@pytest.fixture
def run(tmp_path: Path, alone: None) -> Path:
    """A run of this user's."""
    torch.manual_seed(0)
    train(config(tmp_path))
    return tmp_path / "run"


def test_a_run_loads_when_the_file_is_gone(run: Path, again: Callable[[], None]) -> None:
    copy = run / yaml.safe_load((run / "config.yaml").read_text())["plugins"][0]
    assert copy.read_text() == kind() and copy.parent == run / "plugins"
    (run.parent / "own.py").unlink()
    again()
    assert "own" not in KINDS
    load_run(run)
    again()
    assert load_outline(shutil.copytree(run, run.parent / "moved")).specs["series"].kind == "own"


def test_a_run_from_elsewhere_runs_nothing(run: Path, home: Path, again: Callable[[], None], capfd: Any) -> None:
    (home / "moemm" / "plugins.txt").unlink()
    again()
    copy = next((run / "plugins").iterdir())
    told = f"{copy} \\(sha256 [0-9a-f]{{64}}\\), which you have not run before"
    for load in (load_run, load_outline):
        with pytest.raises(ConfigError, match=told):
            load(run)
    for words in (["evaluate", run], ["inspect", run], ["report", run], ["analyze", "conflict", run],
                  ["analyze", "heterogeneity", run], ["train", run / "config.yaml", "--resume"]):  # fmt: skip
        assert main(list(map(str, words))) == ConfigError.exit_code
        assert "which you have not run before" in capfd.readouterr().err
    assert "own" not in KINDS, "nothing ran"
    assert main(["evaluate", str(run), "--plugin", str(copy)]) == 0
    again()
    assert load_run(run).specs["series"].kind == "own", "it was named once"


def test_a_copy_that_was_changed(run: Path, again: Callable[[], None]) -> None:
    copy = next((run / "plugins").iterdir())
    again()
    write(copy, kind() + "\nopen('/nowhere/at/all')\n")
    with pytest.raises(CheckpointError, match="was changed: its sha256 begins with"):
        load_run(run)
    copy.unlink()
    with pytest.raises(CheckpointError, match="which is not there"):
        load_run(run)
    assert load_run(run, plugins=[run.parent / "own.py"]).specs["series"].kind == "own"


def test_a_name_without_a_hash_is_no_way_round(run: Path, again: Callable[[], None]) -> None:
    again()
    write(run / "plugins" / "plain.py", kind() + "\nraise RuntimeError('it ran')\n")
    text = (run / "config.yaml").read_text()
    write(run / "config.yaml", re.sub(r"plugins: .*", "plugins: [plugins/plain.py]", text))
    with pytest.raises(ConfigError, match="which you have not run before"):
        load_run(run)


def test_other_code_than_the_runs(run: Path, again: Callable[[], None]) -> None:
    again()
    write(run.parent / "own.py", kind() + "\n# changed\n")
    with pytest.warns(UserWarning, match="was made with plugins/own-.*, which is not among the plugins given"):
        load_run(run, plugins=[run.parent / "own.py"])
    again()
    loaded = load_config(run.parent / "tiny.yaml")
    more = replace(loaded, config=replace(loaded.config, train=replace(loaded.config.train, steps=3)))
    with pytest.raises(CheckpointError, match=r"the code is not what .* began with(.|\n)*--plugin .*run/plugins/own-"):
        train(more, resume=True)
    again()
    copy = next((run / "plugins").iterdir())
    assert main(["train", str(loaded.path), "--resume", "--train.steps=3", "--plugin", str(copy)]) == 0


def test_a_run_without_its_plugins_says_what_lacks(run: Path, again: Callable[[], None]) -> None:
    again()
    text = (run / "config.yaml").read_text()
    write(run / "config.yaml", re.sub(r"plugins: .*", "plugins: []", text))
    with pytest.raises(ConfigError, match=r"is of kind 'own', which nothing registers here(.|\n)*--plugin FILE"):
        load_run(run)


def test_no_place_to_note_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(write(tmp_path / "file", "")))
    assert moemm.load_plugin(write(tmp_path / "a.py", kind())).registered == (("modality", "own"),)
    assert not plugins._known()


# Installed packages


class Entry:
    """An entry point as importlib.metadata gives it."""

    dist = None

    def __init__(self, name: str, load: Callable[[], Any]) -> None:
        self.name, self.value, self.load = name, f"package:{name}", load


def offer(monkeypatch: pytest.MonkeyPatch, group: str, *entries: Entry) -> None:
    def find(**wanted: str) -> list[Entry]:
        fits = wanted["group"] == group
        return [entry for entry in entries if fits and wanted.get("name", entry.name) == entry.name]

    monkeypatch.setattr("moemm.config.entry.entry_points", find)


def test_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    path = write(tmp_path / "package.py", kind("packaged"))

    def load() -> Any:
        scope: dict[str, Any] = {"__name__": "package"}
        exec(path.read_text(), scope)
        return scope["Own"]

    def broken() -> Any:
        raise AssertionError("is never loaded")

    offer(monkeypatch, "moemm.modalities", Entry("packaged", load), Entry("other", broken))
    train(config(tmp_path, plugins=[], modalities={"series": {"kind": "packaged"}}))
    KINDS.pop("packaged")
    assert load_run(tmp_path / "run").specs["series"].kind == "packaged", "in a new process too"


def test_an_installed_package_that_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    def load() -> Any:
        exec(compile(kind("packaged") + "\n1 / 0\n", "package.py", "exec"), {"__name__": "package"})

    offer(monkeypatch, "moemm.modalities", Entry("packaged", load))
    with pytest.raises(ConfigError, match=r"package:packaged, but package.py:18 raised ZeroDivisionError"):
        train(config(tmp_path, plugins=[], modalities={"series": {"kind": "packaged"}}))
    assert "packaged" not in KINDS


@pytest.mark.parametrize(
    ("group", "code", "values", "registry"),
    [
        ("moemm.routers", ROUTER, {"model": {"router": {"kind": "own_router"}}}, ROUTERS),
        ("moemm.harmonizers", HARMONIZER, {"harmonize": {"method": "own_harmonizer", "at": "trunk"}}, HARMONIZERS),
        ("moemm.objectives", OBJECTIVE, {"objectives": {"own": {"small": {"weight": 1, "options": {"power": 1}}}}},
         OBJECTIVES),
    ],
)  # fmt: skip
def test_other_groups_of_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None,
    group: str, code: str, values: dict[str, Any], registry: dict[str, Any],
) -> None:  # fmt: skip
    name = re.search(r'"(own_router|own_harmonizer|small)"', code)
    assert name is not None
    offer(monkeypatch, group, Entry(name[1], lambda: exec(code, {"__name__": "package"})))
    train(config(tmp_path, plugins=[], modalities={}, **values))
    assert name[1] in registry


# The page


def test_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "add_a_modality.md").read_text(encoding="utf-8")
    own, data = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    assert len((own + data + recipe).splitlines()) < 60
    write(tmp_path / "events.py", own)
    write(tmp_path / "spikes.yaml", recipe.replace("epochs: 15", "steps: 3"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = [["-c", data], *(["-m", *line.split()] for line in commands.splitlines())]
    for words in lines:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert "spikes" in done.stdout and re.search(r"0\.\d\d\d", done.stdout)
