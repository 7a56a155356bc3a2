"""Models that get more and more modalities, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moemm.config import LoadedConfig
from moemm.config.schema import ExpertGroupConfig, ExtensionConfig, TaskConfig
from moemm.data.catalogue import Catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch, Sample
from moemm.data.writer import LabelData, ModalityData, write_file
from moemm.growth.grown import fresh_model
from moemm.modalities import ModalitySpec
from moemm.models import Model
from moemm.testing.tiny import NUM_CLASSES, NUM_SAMPLES, tiny_config

OLD = ("image", "record", "series")


def write_new(path: Path, modality: str, *, seed: int = 1, columns: int = 5, images: bool = False) -> Path:
    """A file of one more modality, a ragged series, and a label that it tells; some with two old modalities, too."""
    random = np.random.default_rng(seed)
    split = np.arange(NUM_SAMPLES) % 4
    split = np.where(split < 2, 0, split - 1).astype(np.uint8)
    label = random.integers(0, NUM_CLASSES, NUM_SAMPLES)
    series = [
        (random.normal(size=(int(random.integers(4, 9)), columns)) + 2 * value).astype(np.float32)
        for value in label.tolist()
    ]
    values = {modality: ModalityData(kind="timeseries", values=series, ragged=True)}
    if images:
        pixels = random.normal(size=(NUM_SAMPLES, 1, 8, 8)).astype(np.float32)
        pixels[::3] = np.nan
        values["image"] = ModalityData(kind="image", values=pixels, layout="CHW")
        values["series"] = ModalityData(
            kind="timeseries", values=[one[:, :4] for one in series], ragged=True, rate_hz=100.0
        )
    write_file(path, task=path.stem, labels={"label": LabelData(values=label)}, split=split, modalities=values)
    return path


def base_config(folder: Path, **model: Any) -> LoadedConfig:
    """The tiny run with the width that buckets of attention and experts of several widths like."""
    groups = [
        ExpertGroupConfig(kind="shared", width=16),
        ExpertGroupConfig(kind="modality", width=8, per_modality=True, modalities=list(OLD)),
        ExpertGroupConfig(kind="routed", count=5, width=8),
    ]
    loaded = tiny_config(folder)
    experts = replace(loaded.config.model.experts, groups=model.pop("groups", groups))
    return replace(loaded, config=replace(loaded.config, model=replace(loaded.config.model, experts=experts, **model)))


def grown_config(loaded: LoadedConfig, name: str, *, norms: bool = True, experts: bool = True) -> LoadedConfig:
    """`loaded` with a modality and task of this name, whose file lies beside the others; two routed experts for it."""
    data, model = loaded.config.data, loaded.config.model
    path = Path(data.root) / f"{name}.h5"
    if not path.exists():
        write_new(path, name, seed=len(name), images=name in ("radar", "echo"))
    number = len(model.extensions) + 1
    extension = ExtensionConfig(name=name, modalities=[name], tasks=[f"task_{name}"], norms=norms)
    own: dict[str, Any] = {"modalities": [name], "added": number}
    new = [
        ExpertGroupConfig(kind="modality", width=8, id=f"{name}_own", **own),
        ExpertGroupConfig(kind="routed", width=8, count=2 + number, id=name, **own),
    ]
    groups = [*model.experts.groups, *(new if experts else [])]
    changed = replace(
        loaded.config,
        data=replace(data, tasks=[*data.tasks, TaskConfig(name=f"task_{name}", file=path.name)]),
        model=replace(model, experts=replace(model.experts, groups=groups), extensions=[*model.extensions, extension]),
    )
    return replace(loaded, config=changed)


Known = tuple[Catalogue, Mapping[str, ModalitySpec]]


def built(
    loaded: LoadedConfig, known: Known, weights: dict[str, torch.Tensor] | None = None
) -> tuple[Catalogue, Model]:
    """The catalogue, and the model in eval mode; `weights` take the place of those that it draws.

    known: catalogue and specs of more tasks and modalities than these.
    """
    tasks = [task.name for task in loaded.config.data.tasks]
    chosen = tuple(task for task in known[0].tasks if task.name in tasks)
    names = [info.name for info in known[0].modalities if any(info.name in task.modalities for task in chosen)]
    catalogue = Catalogue(tasks=chosen, modalities=tuple(i for i in known[0].modalities if i.name in names))
    model = fresh_model(loaded.config, catalogue, {name: known[1][name] for name in names}).eval()
    unknown = model.load_state_dict(weights or {}, strict=False).unexpected_keys
    assert not unknown, f"the model lost {unknown}"
    return catalogue, model


def shaken(model: Model) -> Model:
    """The model with weights that are far from those that it drew: routers that are sure, norms that are not 1."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.3 * torch.randn(value.shape, generator=random))
    return model


def old_batches(catalogue: Catalogue) -> list[PackedBatch]:
    """Samples of both old tasks together, and of each alone, as this catalogue packs them."""
    shapes, tones = (_samples(catalogue, name) for name in ("shapes", "tones"))
    packer = Packer(catalogue)
    return [packer([*shapes, *tones]), packer(shapes), packer(tones[:1])]


_KEPT: dict[str, list[Sample]] = {}


def _samples(catalogue: Catalogue, task: str) -> list[Sample]:
    """Nine training samples of a task, read once."""
    dataset = SplitDataset(catalogue, task=task, split="train")
    if dataset.task.file not in _KEPT:
        _KEPT[dataset.task.file] = [dataset[item] for item in range(9)]
    return _KEPT[dataset.task.file]


def outputs(catalogue: Catalogue, model: Model) -> list[torch.Tensor]:
    """What the model says of the old batches, task after task."""
    return says(old_batches(catalogue), model)


@torch.no_grad()
def says(batches: Sequence[PackedBatch], model: Model) -> list[torch.Tensor]:
    """The same of batches that were packed before."""
    found = [model(batch).outputs for batch in batches]
    return [one[task] for one in found for task in ("shapes", "tones")]
