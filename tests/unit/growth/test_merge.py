"""`moemm merge` of several runs, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merge_cases import noisy, weights_of, write_run

import moemm
from moemm.cli.app import main
from moemm.config import load_config
from moemm.data.dataset import SplitDataset
from moemm.errors import CheckpointError, ConfigError, MoemmError
from moemm.evaluate import evaluate_run
from moemm.growth import read_receipt
from moemm.growth.merging import METHODS
from moemm.testing.tiny import tiny_config, write_tiny_data
from moemm.train import load_run, train

TRAIN = {"steps": 16, "batch_size": 8, "baselines": False, "log_every": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `base`, `tuned` (which began with it) and `broken` (base with so much noise that it is lost)."""
    folder = tmp_path_factory.mktemp("soup")
    deterministic = torch.are_deterministic_algorithms_enabled()
    train(tiny_config(folder, train={**TRAIN, "output": str(folder / "base")}))
    train(tiny_config(folder, train={**TRAIN, "output": str(folder / "tuned"), "init": str(folder / "base"),
                                     "seed": 1, "label_smoothing": 0.1}, ))  # fmt: skip
    torch.use_deterministic_algorithms(deterministic)
    write_run(folder, "broken", weights=noisy(weights_of(folder / "base"), 3.0))
    return folder


def score_of(folder: Path) -> dict[str, float]:
    return {name: task["value"] for name, task in evaluate_run(load_run(folder), split="val")["tasks"].items()}


def proofs_of(receipt: dict[str, Any], word: str) -> dict[str, Any]:
    return {proof["what"]: proof for proof in receipt["proofs"] if word in proof["what"]}


def test_uniform_is_the_mean_and_a_run(runs: Path, tmp_path: Path, alone: None) -> None:
    """It is scored as the receipt says, and can be trained on."""
    made = moemm.merge([runs / "base", runs / "tuned"], output=tmp_path / "soup")
    assert made.ok and made.operation == "merge uniform" and made.before == made.after
    base, tuned, soup = (weights_of(folder) for folder in (runs / "base", runs / "tuned", tmp_path / "soup"))
    for name, value in soup.items():
        torch.testing.assert_close(value, torch.stack([base[name], tuned[name]]).mean(0), rtol=1e-6, atol=1e-12)
    receipt = read_receipt(tmp_path / "soup")
    assert receipt is not None and [Path(one["folder"]).name for one in receipt["sources"]] == ["base", "tuned"]
    rows = {row["what"]: row["tasks"] for row in receipt["details"]["scores"]}
    assert rows["result"] == score_of(tmp_path / "soup") and rows[str(runs / "base")] == score_of(runs / "base")
    told = proofs_of(receipt, "val accuracy of")
    assert len(told) == 3 * 2 and told["val accuracy of tones: result"]["value"] == rows["result"]["tones"]
    loaded = load_config(tmp_path / "soup" / "config.yaml", ["--train.steps", "1"])
    assert loaded.config.train.init is None
    assert train(loaded, resume=True)["steps"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_itself_is_the_run(method: str, runs: Path, tmp_path: Path) -> None:
    samples = 8 if method == "fisher" else None
    made = moemm.merge([runs / "base"] * 2, output=tmp_path / "soup", method=method, samples=samples)
    assert made.ok
    before, after = weights_of(runs / "base"), weights_of(tmp_path / "soup")
    assert list(before) == list(after)
    assert all(before[name].numpy().tobytes() == value.numpy().tobytes() for name, value in after.items())


def test_greedy_leaves_out_what_does_harm(runs: Path, tmp_path: Path) -> None:
    given = [runs / name for name in ("broken", "base", "tuned")]
    made = moemm.merge(given, output=tmp_path / "soup", method="greedy").to_dict()
    details = made["details"]
    assert made["ok"] and str(runs / "broken") not in details["kept"]
    singles = {row["what"]: row["mean"] for row in details["scores"][:3]}
    assert details["kept"][0] == max(singles, key=lambda name: singles[name])
    tried = details["scores"][3:-1]
    assert [row["what"].split()[-1] for row in tried] == sorted(singles, key=lambda name: -singles[name])
    best = tried[0]["mean"]
    for row in tried[1:]:  # the rule, by hand
        assert row["kept"] is (row["mean"] >= best)
        best = row["mean"] if row["kept"] else best
    assert details["scores"][-1]["mean"] == best >= max(singles.values())
    (gain,) = proofs_of(made, "less the best run").values()
    assert gain["least"] == 0.0 and gain["ok"] is True
    kept = [weights_of(Path(name)) for name in details["kept"]]
    for name, value in weights_of(tmp_path / "soup").items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in kept]).mean(0), rtol=1e-5, atol=1e-7)


def test_the_curve_of_task_vectors_is_kept_and_its_best_taken(runs: Path, tmp_path: Path) -> None:
    alphas = [1.0, 0.0, 0.5]
    given = [runs / "tuned", runs / "broken"]
    made = moemm.merge(given, output=tmp_path / "soup", method="task-vector", base=runs / "base", alphas=alphas)
    details = made.to_dict()["details"]
    assert [point["alpha"] for point in details["curve"]] == alphas and details["base"] == str(runs / "base")
    assert details["curve"][1]["tasks"] == score_of(runs / "base"), "alpha 0 is the base"
    best = max(point["mean"] for point in details["curve"])
    assert details["alpha"] == min(point["alpha"] for point in details["curve"] if point["mean"] == best)
    assert details["alpha"] < 1.0, "a run that is broken is not followed to its end"
    base, *tuned = (weights_of(folder) for folder in (runs / "base", *given))
    for name, value in weights_of(tmp_path / "soup").items():
        expected = base[name] + details["alpha"] * sum(one[name] - base[name] for one in tuned)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_fisher_lies_between_the_runs(runs: Path, tmp_path: Path) -> None:
    made = moemm.merge([runs / "base", runs / "tuned"], output=tmp_path / "soup", method="fisher", samples=12)
    assert made.ok and made.details["samples"] == 12
    base, tuned, soup = (weights_of(folder) for folder in (runs / "base", runs / "tuned", tmp_path / "soup"))
    plain = 0
    for name, value in soup.items():
        low, high = torch.minimum(base[name], tuned[name]), torch.maximum(base[name], tuned[name])
        assert torch.all((low <= value) & (value <= high)), name
        plain += torch.allclose(value, (base[name] + tuned[name]) / 2, rtol=1e-6, atol=1e-9)
    assert plain < len(soup) / 2, "the runs do not count the same"


@pytest.mark.parametrize("method", METHODS)
def test_the_test_split_is_not_read(method: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    begin = SplitDataset.__init__

    def spy(self: SplitDataset, *args: Any, split: str, **named: Any) -> None:
        read.add(split)
        begin(self, *args, split=split, **named)

    monkeypatch.setattr(SplitDataset, "__init__", spy)
    samples = 4 if method == "fisher" else None
    moemm.merge([runs / "base", runs / "tuned"], output=tmp_path / "soup", method=method, samples=samples)
    assert read == ({"train", "val"} if method == "fisher" else {"val"})


def test_what_a_run_knows_of_its_losses_begins_anew(tmp_path: Path) -> None:
    changes = {"harmonize": {"scale": "dwa"}, "train": {"steps": 4}}
    first = write_run(tmp_path, "first", **changes)
    states = [name for name in weights_of(first) if name.startswith("scale.")]
    marked = {name: value + 5 if name in states else value for name, value in weights_of(first).items()}
    second = write_run(tmp_path, "second", weights=marked, **changes)
    made = moemm.merge([second, first], output=tmp_path / "soup")
    soup = weights_of(tmp_path / "soup")
    assert states and all(torch.equal(soup[name], weights_of(first)[name]) for name in states)
    assert f"began anew: {len(states)} tensors of how each run's own losses went" in made.changed


def test_the_command_shows_scores_and_what_next(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", str(runs / "base"), str(runs / "tuned"), "--method", "task-vector", "--output"]
    assert main([*words, str(tmp_path / "soup"), "--alphas", "0,0.25,1"]) == 0
    out, err = capsys.readouterr()
    for text in ("merge task-vector", "shapes accuracy", "alpha 0.25", "result", "holds"):
        assert text in out
    assert out.rstrip().endswith(f"to train    moemm train {tmp_path / 'soup' / 'config.yaml'} --resume")
    assert "alpha 0.25: mean on val" in err
    assert main([*words, str(tmp_path / "again"), "--alphas", "0,1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["details"]["curve"][1]["alpha"] == 1.0
    assert main(["evaluate", str(tmp_path / "soup"), "--split", "val", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 0


def test_a_merged_run_remembers_where_it_came_from(runs: Path, tmp_path: Path) -> None:
    moemm.merge([runs / "base", runs / "tuned"], output=tmp_path / "one")
    moemm.merge([tmp_path / "one", runs / "base"], output=tmp_path / "two")
    receipt = read_receipt(tmp_path / "two")
    assert receipt is not None and [one["target"] for one in receipt["history"]] == [str(tmp_path / "one")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "average"}, "--method average: unknown.*\n.*uniform, greedy, fisher, task-vector"),
        ({"method": "gredy"}, "did you mean greedy"),
        ({"base": "x"}, "--base is for --method task-vector"),
        ({"alphas": [0.5], "method": "fisher"}, "--alphas is for --method task-vector"),
        ({"alphas": [], "method": "task-vector"}, "must be numbers"),
        ({"alphas": [float("nan")], "method": "task-vector"}, "must be numbers"),
        ({"samples": 0, "method": "fisher"}, "--samples 0: must be at least 1"),
        ({"samples": 5}, "--samples is for --method fisher"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, Any], message: str, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        moemm.merge([runs / "base", runs / "tuned"], output=tmp_path / "soup", **given)
    assert not (tmp_path / "soup").exists()


def test_one_run_alone_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one run alone cannot be averaged"):
        moemm.merge([runs / "base"], output=tmp_path / "soup")
    made = moemm.merge([runs / "tuned"], base=runs / "base", method="task-vector", alphas=[1], output=tmp_path / "soup")
    assert made.ok, "with a base it is not alone"


def refused(first: Path, second: Path, *words: str, kind: type[MoemmError] = ConfigError) -> None:
    with pytest.raises(kind) as error:
        moemm.merge([first, second], output=first.parent / "soup")
    assert all(word in str(error.value) for word in words), error.value
    assert not (first.parent / "soup").exists()


def test_other_models_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path, "first")
    changes = {"dim": 32, "heads": 2, "layers": 2, "experts": {"groups": [{"kind": "shared", "width": 16}]}}
    second = write_run(tmp_path, "second", model=changes)
    refused(first, second, "different models, at model.dim", f"16 in {first}, 32 in {second}", "to do:")


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path, "first")
    tasks = [{"name": "forms", "file": "shapes.h5"}, {"name": "tones", "file": "tones.h5"}]
    data = {"root": str(tmp_path), "num_workers": 0, "tasks": tasks}
    second = write_run(tmp_path, "second", data=data)
    refused(first, second, "different tasks, at tasks.in order.0", '"shapes"', '"forms"')


def test_other_statistics_are_refused(tmp_path: Path) -> None:
    """The same shapes and another train split: each tokenizer sees numbers of another size."""
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_tiny_data(folder, seed=seed)
    first, second = (write_run(folder, "run") for folder in folders)
    refused(first, second, "different modalities, at modalities.", "fitted", "train.init")


def test_other_objectives_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path, "first")
    second = write_run(tmp_path, "second", objectives={"masked": {"weight": 1.0}})
    refused(first, second, "different tensors, at pretext.", f"in {second}", "same objectives")


def test_what_is_for_training_alone_may_differ(tmp_path: Path) -> None:
    first = write_run(tmp_path, "first")
    second = write_run(
        tmp_path, "second", seed=1,
        model={**load_config(first / "config.yaml").source["model"], "dropout": 0.3,
               "router": {"losses": {"balance": 0.5}}},
    )  # fmt: skip
    assert moemm.merge([first, second], output=tmp_path / "soup").ok


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path, "first")
    weights = weights_of(first)
    weights["heads.linear.tones.bias"][0] = np.nan
    second = write_run(tmp_path, "second", weights=weights)
    refused(first, second, str(second), "heads.linear.tones.bias", "not finite", kind=CheckpointError)


def test_a_run_is_not_written_over(runs: Path) -> None:
    before = (runs / "base" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        moemm.merge([runs / "base", runs / "tuned"], output=runs / "base")
    assert (runs / "base" / "config.yaml").read_bytes() == before


def test_runs_without_labels_have_nothing_to_choose_by(tmp_path: Path) -> None:
    changes = {"objectives": {"supervised": {"weight": 0.0}, "masked": {"weight": 1.0}}}
    made = [write_run(tmp_path, name, seed=seed, **changes) for seed, name in enumerate(("first", "second"))]
    with pytest.raises(ConfigError, match="learned from none"):
        moemm.merge(made, output=tmp_path / "soup", method="greedy")
    assert moemm.merge(made, output=tmp_path / "soup").ok


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere", "base"], 4, "nowhere: no such run folder"),
        (["base", "tuned", "--method", "task-vector", "--alphas", "0,much"], 2, "--alphas 0,much: must be numbers"),
        (["base"], 2, "one run alone"),
        ([], 2, "one run alone"),
    ],
)
def test_the_command_says_what_is_wrong(
    words: list[str], code: int, message: str, runs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(runs)
    assert main(["merge", *words, "--output", "soup"]) == code
    assert message in capsys.readouterr().err


def test_the_command_knows_its_methods(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(runs / "base"), str(runs / "tuned"), "--output", str(runs / "soup")]
    assert main(["merge", *words, "--method", "median"]) == 2
    assert "median" in "".join(capsys.readouterr())
