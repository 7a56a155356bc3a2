"""A trained model as one folder, and predictions with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import moemm
from moemm.checkpoint import verify
from moemm.cli.app import main
from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.errors import CheckpointError, ConfigError, DataError
from moemm.evaluate import Predictor
from moemm.testing.tiny import tiny_config
from moemm.train import load, load_run, train
from moemm.train.exporting import export_run

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
            patch.delenv(name, raising=False)
        train(tiny_config(folder, train={"output": str(folder / "run"), "steps": 20, "lr": 1e-2}))
    yield folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    assert main(["export", str(run), str(run.parent / "out")]) == 0
    return run.parent / "out"


def samples(run: Path, task: str) -> list[dict[str, Any]]:
    catalogue = build_catalogue(load_run(run).config.data, base=run)
    dataset = SplitDataset(catalogue, task=task, split="test")
    return [dataset[item].modalities for item in range(len(dataset))]


def test_an_export_is_safetensors_and_json_and_verifies(run: Path, exported: Path) -> None:
    manifest = verify(exported)
    assert manifest.step == 20 and manifest.weights_only
    described = {"model.safetensors", "config.yaml", "modalities.json", "catalogue.json", "expert_map.json"}
    assert set(manifest.files) == described
    assert not [path for path in run.parent.iterdir() if path.suffix == ".tmp"]
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    for folder in (exported, checkpoint):  # safetensors makes files that their owner alone may read
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    assert json.loads((exported / "expert_map.json").read_text()) == manifest.expert_map
    trained = load_file(run / "checkpoints" / "step_000020" / "model.safetensors")
    weights = load_file(exported / "model.safetensors")
    assert set(weights) == set(trained) and all(torch.equal(weights[name], trained[name]) for name in trained)


@pytest.mark.parametrize("task", ["shapes", "tones"])
def test_exported_run_and_checkpoint_answer_as_the_run_is_scored(run: Path, exported: Path, task: str) -> None:
    given, loaded = samples(run, task), load_run(run)
    found = [load(path)(given, task=task) for path in (exported, run, run / "checkpoints" / "step_000020")]
    scores = np.stack([[one.scores for one in predictions] for predictions in found])
    assert (scores[0] == scores[1]).all() and (scores[0] == scores[2]).all()
    np.testing.assert_allclose(scores[0].sum(-1), 1.0, rtol=1e-5)
    value = moemm.evaluate_run(loaded)["tasks"][task]["value"]
    dataset = SplitDataset(loaded.catalogue, task=task, split="test")
    right = [one.answer == "abc"[int(dataset[i].target)] for i, one in enumerate(found[0])]  # type: ignore[arg-type]
    assert np.mean(right) == pytest.approx(value) and value > 0.5


def test_it_needs_neither_deepspeed_nor_the_data(exported: Path, tmp_path: Path) -> None:
    """In another process, from another folder, with the run gone."""
    copy = tmp_path / "elsewhere"
    shutil.copytree(exported, copy)
    code = f"""
import sys
sys.modules["deepspeed"] = None
import numpy as np, moemm
model = moemm.load({str(copy)!r})
image = np.ones((1, 8, 8), np.float32)
(one,) = model.predict([{{"image": image}}], task="shapes")
print(one.answer, one.scores.shape, list(model.tasks))
"""
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root), "PATH": ""},
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in "abc" and "(3,) ['shapes', 'tones']" in done.stdout


def test_samples_may_lack_modalities_and_batches_do_not_matter(exported: Path) -> None:
    model = load(exported)
    image = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    given = [{"image": one} for one in image]
    one, many = (model.predict(given, task="shapes", batch_size=size) for size in (2, 256))
    np.testing.assert_allclose([a.scores for a in one], [a.scores for a in many], rtol=1e-5)
    assert model.predict([], task="shapes") == []


@pytest.mark.parametrize(
    ("given", "task", "error", "said"),
    [
        (
            [{"image": np.ones((1, 8, 8), np.float32)}],
            None,
            ConfigError,
            r"no task was given; this model has shapes, ton",
        ),
        ([], "shape", ConfigError, "there is no task 'shape'; did you mean shapes"),
        ([{}], "shapes", DataError, "sample 0 has no modality"),
        ([{"imge": np.ones(1)}], "shapes", DataError, "'imge', which task shapes does not know; did you mean image"),
        ([{"series": np.ones((3, 4), np.float32)}], "shapes", DataError, "'series', which task shapes does not know"),
        ([{"image": np.ones((1, 8, 9), np.float32)}], "shapes", DataError, r"shape \(1, 8, 9\)"),
        ([{"image": np.ones((1, 8, 8))}], "shapes", DataError, "float64"),
        ([{"series": np.ones((0, 4), np.float32)}], "tones", DataError, "have none of the modalities series"),
    ],
)
def test_what_it_cannot_answer(exported: Path, given: Any, task: str | None, error: type[Exception], said: str) -> None:
    model: Predictor = load(exported)
    with pytest.raises(error, match=said):
        model.predict(given, task=task)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "modalities.json", "catalogue.json"])
def test_an_export_that_was_altered_is_refused(exported: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=f"copy/{name} has the wrong sha256"):
        load(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError):
        load(copy)


def test_where_there_is_no_model_or_no_room(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no trained model\n  allowed"):
        load(tmp_path)
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 4
    with pytest.raises(ConfigError, match="is there already"):
        export_run(run, exported)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        export_run(run, tmp_path / "file" / "out")


def test_training_begins_with_an_export(exported: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    options = {"output": str(tmp_path / "again"), "steps": 1, "init": str(exported)}
    assert train(tiny_config(data, train=options))["steps"] == 1
    log = (tmp_path / "again" / "metrics.jsonl").read_text()
    assert f"of {exported}" in log and "fresh here" not in log
