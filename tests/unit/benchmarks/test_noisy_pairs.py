"""The benchmark of wrong pairs: what it plants, what it draws at random, and how it scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.noisy_pairs import DIGITS, MOTIONS, SETTINGS, Setting, area, patched, random_drop, triplets
from moemm.data.file import DataFile
from moemm.harmonize import Context
from moemm.harmonize.methods import curriculum
from moemm.objectives.noise import PairNoise

QUICKSTART = Path(__file__).parents[3] / "data" / "quickstart"


def test_area_under_the_curve() -> None:
    positive = np.array([False, False, True, True])
    assert area(np.array([0.1, 0.2, 0.3, 0.4]), positive) == 1.0
    assert area(np.array([0.4, 0.3, 0.2, 0.1]), positive) == 0.0
    assert area(np.array([0.1, 0.3, 0.2, 0.4]), positive) == 0.75


def test_settings_have_names_of_their_own_and_are_of_equal_length() -> None:
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS), "a name is a row and a file of results"
    passes = {setting.copies * setting.epochs for setting in SETTINGS if setting.epochs > 1}
    assert passes == {60}, "passes over the clips"


def test_what_is_planted_is_what_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEMM_SUITE", str(QUICKSTART))
    planted = triplets(tmp_path, Setting(0.25, wrong=("text", "audio"), copies=1), seed=0)
    with DataFile(tmp_path / "triplets.h5") as file:
        split, digit, motion = np.asarray(file.split), file.targets(), file.targets("label_motion")
        texts = [str(file.read("text", index)) for index in range(len(file))]
        sizes = {name: int((split == number).sum()) for number, name in enumerate(("train", "val", "test"))}
    told = [
        DIGITS[digit[row]] in text.split() and any(text.endswith(way) for way in MOTIONS[motion[row]])
        for row, text in enumerate(texts)
    ]
    assert len(planted) == len(texts) and not planted[split != 0].any(), "val and test are clean"
    assert planted.sum() == pytest.approx(0.25 * sizes["train"], abs=2)
    assert (np.array(told) == ~planted).all()


def test_dropping_at_random_drops_as_many() -> None:
    z_XTD = torch.randn(200, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram_XTT = z_XTD @ z_XTD.mT
    context = Context(generator=torch.Generator().manual_seed(0))
    wanted, found = curriculum(gram_XTT, context), random_drop(gram_XTT, context)
    assert found.sum() == wanted.sum() and 0.2 < float(found.mean()) < 0.8
    assert not torch.equal(found, wanted), "others"


def test_patches_are_taken_back() -> None:
    wrong, row_N = np.array([True, False, False, True]), torch.arange(4)
    noise, plain = PairNoise([4], 2, start=0.0), PairNoise.weights
    noise.right_RP[:, 1] = torch.tensor([0.0, 0.1, 0.2, 0.3])
    with patched("oracle", wrong, 0):
        assert noise.weights(row_N)[:, 1].tolist() == [0.0, 1.0, 1.0, 0.0]
        assert noise.weights(row_N)[:, 0].tolist() == [1.0] * 4, "only the pair with text is planted"
    with patched("shuffled", wrong, 0):
        dealt = noise.weights(row_N)[:, 1]
        assert sorted(dealt.tolist()) == sorted(noise.right_RP[:, 1].tolist())
    with patched("oracle", wrong, 0, ("text", "audio")):
        assert noise.weights(row_N).tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    assert PairNoise.weights is plain
