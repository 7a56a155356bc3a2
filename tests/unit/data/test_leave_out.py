"""A batch without some of its parts is what the packer makes of the samples that are left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moemm.data.build import build_catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.leave_out import leave_out
from moemm.data.pack import Packer
from moemm.data.sample import Sample
from moemm.testing.tiny import tiny_config


@pytest.mark.parametrize(
    ("modalities", "tasks"), [(["image"], []), (["series"], []), ([], ["shapes"]), (["record"], ["tones"]), ([], [])]
)
def test_what_is_left_is_what_the_packer_makes_of_it(tmp_path: Path, modalities: list[str], tasks: list[str]) -> None:
    catalogue = build_catalogue(tiny_config(tmp_path).config.data, base=tmp_path)

    def draw() -> list[Sample]:
        sets = [SplitDataset(catalogue, task=task.name, split="train") for task in catalogue.tasks]
        return [dataset[i] for i in range(5) for dataset in sets]

    pack = Packer(catalogue)
    found = leave_out(pack(draw()), catalogue.tasks, modalities=modalities, tasks=tasks)
    kept = [sample for sample in draw() if sample.task not in tasks]
    for sample in kept:
        sample.modalities = {name: value for name, value in sample.modalities.items() if name not in modalities}
    expected = pack([sample for sample in kept if sample.modalities])
    tensors: list[list[torch.Tensor]] = [[], []]
    for batch, into in zip((found, expected), tensors, strict=True):
        batch.map(lambda one, into=into: into.append(one) or one)  # type: ignore[misc]
    assert len(tensors[0]) == len(tensors[1]) > 8
    for mine, other in zip(*tensors, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_nothing_may_be_left(tmp_path: Path) -> None:
    catalogue = build_catalogue(tiny_config(tmp_path).config.data, base=tmp_path)
    batch = Packer(catalogue)([SplitDataset(catalogue, task="tones", split="train")[0]])
    empty = leave_out(batch, catalogue.tasks, modalities=["series"])
    assert empty.num_samples == 0 and all(len(one) == 0 for one in empty.modalities.values())
