"""Curves of all recipes are what their files say (docs/faults.md); `python -m benchmarks.faults.golden` makes these."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import golden
from benchmarks.faults.golden import ALL, ONE, WITH_DROPOUT
from moemm.testing.forked import shared_nursery

Found = tuple[dict[str, str], dict[tuple[str, str], dict[str, Any]]]

TWO = [("moemm", "2 ranks, ZeRO 2"), ("highmmt", "2 ranks, ZeRO 3")]
ALONE = [(recipe, WITH_DROPOUT) for recipe in golden.RECIPES if recipe not in dict(TWO)]
"""With TWO each recipe once."""
LONG = [pair for pair in ALL if pair not in [*ALONE, *TWO]]
OTHER_KIND = {"cpu": "another one"}
SMALL_FILE = 15_000
DENSE = ("dense", ONE)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return golden.curves(shared_nursery(), tmp_path_factory.mktemp("golden"), [*ALONE, *TWO])


@pytest.mark.parametrize("pair", [*ALONE, *TWO], ids=", ".join)
def test_a_curve_is_what_it_was(found: Found, pair: tuple[str, str]) -> None:
    kind, curves = found
    assert golden.judge(*pair, curves[pair], kind) == ""


@pytest.mark.soak
@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_all_other_curves_are_what_they_were(recipe: str, tmp_path: Path) -> None:
    kind, curves = golden.curves(shared_nursery(), tmp_path, [pair for pair in LONG if pair[0] == recipe])
    assert [text for pair, curve in curves.items() if (text := golden.judge(*pair, curve, kind))] == []


def test_every_recipe_has_its_file() -> None:
    assert sorted(path.stem for path in golden.FILES.glob("*.json")) == sorted(golden.RECIPES)
    assert len(golden.RECIPES) >= 12


@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_a_file_is_whole_and_small(recipe: str) -> None:
    path, stored = golden.FILES / f"{recipe}.json", golden.read(recipe)
    assert path.stat().st_size < SMALL_FILE
    assert stored["recipe"] == recipe and list(stored["cases"]) == list(golden.CASES)
    for entry in stored["cases"].values():
        assert len(entry["steps"]) == golden.STEPS and len(entry["weights"]) == 64
        assert all(math.isfinite(number) and number > 0 for step in entry["steps"] for number in step)
        assert entry["steps"][0][0] != entry["steps"][-1][0], "nothing was learned"


@pytest.mark.parametrize("recipe", golden.RECIPES)
def test_ranks_and_stages_are_one_computation(recipe: str) -> None:
    stored = golden.read(recipe)
    assert golden.between_worlds(stored) == []
    hashes = {case: entry["weights"] for case, entry in stored["cases"].items()}
    assert hashes[WITH_DROPOUT] != hashes[ONE] or not draws(recipe)


def draws(recipe: str) -> bool:
    return golden.own_overrides(recipe, ONE) != golden.own_overrides(recipe, WITH_DROPOUT)


def test_a_stage_that_computes_something_else_is_told_apart() -> None:
    stored = golden.read("moemm")
    stored["cases"]["2 ranks, ZeRO 1"]["steps"][11][0] *= 1 + 2e-4
    (text,) = golden.between_worlds(stored)
    assert text.startswith("moemm, 2 ranks, ZeRO 1, not as 1 rank: loss of step 12: was ")
    stored = golden.read("moma")
    stored["cases"]["2 ranks, ZeRO 3"]["steps"][2][0] *= 1 - 2e-4
    (text,) = golden.between_worlds(stored)
    assert text.startswith("moma, 2 ranks, ZeRO 3, not as 2 ranks, ZeRO 0: loss of step 3: was ")


def test_another_learning_rate_is_told_apart(tmp_path: Path) -> None:
    kind, curves = golden.curves(shared_nursery(), tmp_path, [DENSE], changed=["train.lr=0.00202"])
    stored = golden.read("dense")
    (_, (was, _), *_), (_, (value, _), *_) = (entry["steps"] for entry in (stored["cases"][ONE], curves[DENSE]))
    text = f"dense, 1 rank: loss of step 2: was {was!r}, is {value!r} (relative 1.6e-04)"
    assert golden.judge(*DENSE, curves[DENSE], OTHER_KIND) == text, "the first step has no rate yet"
    if kind == stored["machine"]:
        assert golden.judge(*DENSE, curves[DENSE], kind) == text


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    content = golden.read("dense")
    monkeypatch.setattr(golden, "FILES", tmp_path)
    golden.write(tmp_path / "dense.json", content)
    return content


def nudged(curve: dict[str, Any], step: int, at: int, share: float) -> dict[str, Any]:
    found = copy.deepcopy(curve)
    value = found["steps"][step - 1][at]
    found["steps"][step - 1][at] = math.nextafter(value, math.inf) if share == 0.0 else value * (1 + share)
    return found


def test_the_last_bit_counts_on_the_same_kind_of_machine_alone(stored: dict[str, Any]) -> None:
    curve, kind = stored["cases"][ONE], stored["machine"]
    assert golden.judge(*DENSE, curve, kind) == golden.judge(*DENSE, curve, OTHER_KIND) == ""
    for at, what in enumerate(("loss", "gradient norm")):
        bit = nudged(curve, 7, at, 0.0)
        assert golden.judge(*DENSE, bit, kind).startswith(f"dense, 1 rank: {what} of step 7: was ")
        assert golden.judge(*DENSE, bit, OTHER_KIND) == ""
    weights = {**curve, "weights": "0" * 64}
    assert golden.judge(*DENSE, weights, kind).startswith("dense, 1 rank: sha256 of the weights: was ")
    assert golden.judge(*DENSE, weights, OTHER_KIND) == ""


def test_elsewhere_a_loss_may_be_off_by_a_ten_thousandth(stored: dict[str, Any]) -> None:
    curve = stored["cases"][ONE]
    assert golden.judge(*DENSE, nudged(curve, 20, 0, 0.9e-4), OTHER_KIND) == ""
    assert "loss of step 20" in golden.judge(*DENSE, nudged(curve, 20, 0, 1.1e-4), OTHER_KIND)
    for share in (math.nan, math.inf):
        assert "loss of step 3" in golden.judge(*DENSE, nudged(curve, 3, 0, share), OTHER_KIND)
    short = {**curve, "steps": curve["steps"][:-1]}
    assert "number of steps: was 20, is 19" in golden.judge(*DENSE, short, OTHER_KIND)


def test_a_file_of_other_overrides_is_refused(stored: dict[str, Any], tmp_path: Path) -> None:
    stored["cases"][ONE]["overrides"].append("train.lr=1.0")
    golden.write(tmp_path / "dense.json", stored)
    text = golden.judge(*DENSE, stored["cases"][ONE], stored["machine"])
    assert "has not this case with these overrides: python -m benchmarks.faults.golden dense" in text
    with pytest.raises(FileNotFoundError, match=r"python -m benchmarks\.faults\.golden moma"):
        golden.read("moma")


def test_what_changed_is_said_by_case(stored: dict[str, Any], tmp_path: Path) -> None:
    assert json.loads((tmp_path / "dense.json").read_text()) == stored == golden.read("dense")
    assert golden.changes(stored, stored) == []
    assert golden.changes(None, stored) == ["new, 6 cases"]
    new = copy.deepcopy(stored)
    new["cases"][ONE] = nudged(nudged(new["cases"][ONE], 4, 0, 1e-3), 9, 0, 1e-2)
    new["machine"]["torch"] = "9"
    new["cases"][WITH_DROPOUT]["overrides"] = ["model.layers=2"]
    del new["cases"]["2 ranks, ZeRO 3"]
    machine, other, one, gone = golden.changes(stored, new)
    assert machine == f"torch: 9, not {stored['machine']['torch']}"
    assert other == f"{WITH_DROPOUT}: other overrides, the same curve"
    was, value = (content["cases"][ONE]["steps"][3][0] for content in (stored, new))
    assert one.startswith(f"1 rank: loss of step 4: was {was!r}, is {value!r} (relative 1.0e-03)")
    assert one.endswith("losses differ by up to 1.0e-02") and gone == "2 ranks, ZeRO 3: gone"
