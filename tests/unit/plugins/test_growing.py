"""`--plugin` of verbs that make a run of others: a kind of one's own comes in, and is kept with what is written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moemm import plugins
from moemm.cli.app import main
from moemm.config import load_config
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.modalities import KINDS
from moemm.testing.tiny import tiny_config
from moemm.train import load_run, train

pytestmark = pytest.mark.usefixtures("alone")
Capture = pytest.CaptureFixture[str]
CODE = """
import moemm
from moemm.modalities.timeseries import TimeSeries

@moemm.register_modality("{name}")
class Own(TimeSeries):
    defaults = {{**TimeSeries.defaults, "patch": [4]}}
"""
DENSE = {"dim": 16, "heads": 2, "layers": 1, "experts": {"groups": [{"kind": "shared", "width": 16}]}}
QUICK = ["--samples", "8", "--trial-steps", "1", "--init", "random", "--train.steps", "1"]


def code(path: Path, name: str, *, more: str = "") -> Path:
    path.write_text(CODE.format(name=name) + more)
    return path


def new_data(path: Path, kind: str, seed: int) -> Path:
    """40 samples of a task with one modality of a kind of one's own; both have the file's name."""
    random = np.random.default_rng(seed)
    values = random.normal(size=(40, 8, 3)).astype(np.float32)
    write_file(
        path, task=f"{path.stem}_task", labels={"label": LabelData(values=np.arange(40) % 2)},
        split=np.array([0, 0, 1, 2] * 10, np.uint8), modalities={path.stem: ModalityData(kind=kind, values=values)},
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`plain`, a sparse run of built-in kinds; `own`, a dense one whose series are of the kind of kept.py."""
    found, before = tmp_path_factory.mktemp("growing"), torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(found / "elsewhere"))
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        short = {"steps": 1, "batch_size": 8, "baselines": False}
        train(tiny_config(found, train={**short, "output": str(found / "plain")}))
        code(found / "kept.py", "kept")
        loaded = tiny_config(
            found, model=DENSE, modalities={"series": {"kind": "kept"}}, train={**short, "output": str(found / "own")}
        )
        train(load_config(loaded.path, [f"--plugins=[{found / 'kept.py'}]"]))
    for plugin in plugins._LOADED.values():
        sys.modules.pop(plugin.module, None)
    plugins._LOADED.clear()
    KINDS.pop("kept")
    torch.use_deterministic_algorithms(before)
    yield found


def names(run: Path) -> list[str]:
    """Plugins of a run's configuration, each without its hash; all are files in the run."""
    found = yaml.safe_load((run / "config.yaml").read_text())["plugins"]
    assert all(name.startswith("plugins/") and (run / name).is_file() for name in found)
    return [name.split("/")[1].rpartition("-")[0] for name in found]


def test_a_kind_of_ones_own_extends_a_run(
    folder: Path, tmp_path: Path, again: Callable[[], None], home: Path, capsys: Capture
) -> None:
    """And a second one on top of it, by a plan; both stay, whatever becomes of the files."""
    first, second = (code(tmp_path / f"{name}.py", name) for name in ("one", "two"))
    data = [str(new_data(tmp_path / f"{name}s.h5", name, seed)) for seed, name in enumerate(("one", "two"))]
    grown, both, plan = (tmp_path / name for name in ("grown", "both", "plan.json"))
    common = ["extend", str(folder / "plain"), "--data", data[0], *QUICK, "--output", str(grown)]
    assert main([*common, "--plugin", str(first)]) == 0
    assert names(grown) == ["one"] and load_config(folder / "plain" / "config.yaml").config.plugins == []
    first.unlink()
    again()
    assert load_run(grown).specs["ones"].kind == "one"

    more = ["extend", str(grown), "--data", data[1], *QUICK, "--plan", str(plan)]
    assert main([*more, "--plugin", str(second)]) == 0
    assert json.loads(plan.read_text())["config"]["plugins"][-1] == str(second)
    again()
    carry_out = ["extend", str(grown), "--plan", str(plan), "--no-train", "--output", str(both)]
    second.rename(tmp_path / "two_is_gone.py")
    assert main(carry_out) == 4 and "two.py, which is not there" in capsys.readouterr().err and not both.exists()
    (tmp_path / "two_is_gone.py").rename(second)
    known = (home / "moemm" / "plugins.txt").read_text().splitlines(keepends=True)
    (home / "moemm" / "plugins.txt").write_text(known[0])
    assert main(carry_out) == 2, "a plan from elsewhere runs nothing"
    assert f"run code, {second}" in capsys.readouterr().err and not both.exists()
    assert main([*carry_out, "--plugin", str(second)]) == 0
    assert names(both) == ["one", "two"]
    second.unlink()
    again()
    assert main(["extend", "check", str(both)]) == 0
    back = tmp_path / "back"
    assert main(["extend", "remove", str(both), "--name", "twos", "--output", str(back)]) == 0
    assert load_run(back).specs["ones"].kind == "one"


@pytest.mark.parametrize("verb", ["merge", "upcycle"])
def test_a_run_from_elsewhere_is_made_into_another(folder: Path, tmp_path: Path, verb: str, capsys: Capture) -> None:
    """Its code is not run until the user names it; what is written then has a copy."""
    run, out = folder / "own", tmp_path / "out"
    arguments = [verb, *([str(run)] * (1 + (verb == "merge"))), "--output", str(out)]
    assert main(arguments) == 2
    assert "which you have not run before" in capsys.readouterr().err and not out.exists()
    copy = next((run / "plugins").iterdir())
    assert main([*arguments, "--plugin", str(copy)]) == 0
    assert names(out) == ["kept"] and load_run(out).specs["series"].kind == "kept"


def test_a_recipe_with_a_router_of_ones_own(folder: Path, tmp_path: Path) -> None:
    """--plugin takes the place of the recipe's `plugins`, and comes beside those of the run."""
    router = tmp_path / "router.py"
    router.write_text(
        "import moemm\n@moemm.register_router('mine')\ndef mine(given):\n"
        "    from moemm.moe.routers import softmax\n    return softmax(given)\n"
    )
    groups = [{"kind": "routed", "count": 2, "width": 16}]
    section: dict[str, Any] = {**DENSE, "experts": {"groups": groups}, "router": {"kind": "mine"}}
    tiny_config(tmp_path, model=section)
    recipe, copy = tmp_path / "tiny.yaml", next((folder / "own" / "plugins").iterdir())
    recipe.write_text(recipe.read_text() + "plugins: [nowhere.py]\n")
    arguments = ["upcycle", str(folder / "own"), "--recipe", str(recipe), "--output", str(tmp_path / "out")]
    main([*arguments, "--plugin", str(copy), "--plugin", str(router)])  # the gates of `mine` are no proof's matter
    assert names(tmp_path / "out") == ["kept", "router"]
    assert load_run(tmp_path / "out").config.model.router.kind == "mine"


VERBS = {
    "merge": ["merge", "{0}/plain", "{0}/plain"],
    "upcycle": ["upcycle", "{0}/own"],
    "extend": ["extend", "{0}/plain", "--data", "{1}/owns.h5"],
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("file", "told"),
    [("gone.py", "no such plugin file"), ("bad.py", "bad.py:9 raised ZeroDivisionError"), ("x.txt", "no Python file")],
)
def test_what_is_refused_writes_nothing(
    folder: Path, tmp_path: Path, home: Path, verb: str, file: str, told: str, capsys: Capture
) -> None:
    code(tmp_path / "bad.py", "own", more="\n1 / 0\n")
    (tmp_path / "x.txt").write_text("")
    new_data(tmp_path / "owns.h5", "own", 0)
    if verb == "upcycle":  # its own copy must not be what is refused
        plugins.load_plugin(next((folder / "own" / "plugins").iterdir()))
    noted = plugins._known()
    before = sorted(folder.rglob("*"))
    arguments = [word.format(folder, tmp_path) for word in VERBS[verb]]
    assert main([*arguments, "--output", str(tmp_path / "out"), "--plugin", str(tmp_path / file)]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and sorted(folder.rglob("*")) == before and "own" not in KINDS
    assert plugins._known() == noted
