"""Reading the run that is to grow, and writing the one that has grown: a run folder like any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moemm.checkpoint import Keep, Manifest, commit, newest_complete
from moemm.checkpoint.manifest import versions
from moemm.checkpoint.state import WEIGHTS, Moments
from moemm.checkpoint.store import read_weights
from moemm.checkpoint.tensors import save_tensors
from moemm.config import Config, LoadedConfig, config_hash, to_dict
from moemm.data.catalogue import Catalogue
from moemm.distributed import World
from moemm.errors import ConfigError
from moemm.growth.receipt import FILE_NAME, Receipt, Size, weights_hash
from moemm.modalities import ModalitySpec
from moemm.models import Model
from moemm.plugins import beside_own
from moemm.train import Run, load_run
from moemm.train.setup import CHECKPOINTS, CONFIG, SUMMARY, Setup, seeded_model, store_run

Specs = Mapping[str, ModalitySpec]


@dataclass(frozen=True, slots=True)
class Base:
    """A trained run, and its weights by name and the optimizer's states, as the newest complete checkpoint has them."""

    run: Run
    weights: dict[str, torch.Tensor]
    moments: Callable[[], Moments | None]
    """Reads them; None where the checkpoint has weights alone."""

    def as_source(self) -> dict[str, object]:
        """What a receipt says of it."""
        return {"folder": str(self.run.folder), "step": self.run.step, "sha256": weights_hash(self.weights)}


def read_base(path: Path | str, *, plugins: Sequence[Path | str] = ()) -> Base:
    """Load the run that is to grow, with its data. What is raised: as `load_run`.

    plugins: Python files to run beside the run's own copies (in place of one of the same name); they are then in its
    configuration, and so in that of what it grows into.
    """
    run = load_run(path, plugins=beside_own(Path(path), CONFIG, plugins))
    found = newest_complete(run.folder / CHECKPOINTS)
    return Base(run, read_weights(found.folder), lambda: Moments.read(found.folder, found.manifest.files))


def fresh_model(config: Config, catalogue: Catalogue, specs: Specs) -> Model:
    """The model of a configuration on the CPU, with the weights that `train.seed` draws; torch's own draws go on as if
    nothing had been drawn. Raises ConfigError.
    """  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        return seeded_model(Setup(config, catalogue, dict(specs), Path(), 0), torch.device("cpu"))


def size_of(model: Model) -> Size:
    """All and active parameters."""
    total, active = model.num_parameters()
    return Size(total=total, active=active)


def check_target(folder: Path) -> None:
    """Refuse to write over a run. Raises ConfigError."""
    if any((folder / name).exists() for name in (CHECKPOINTS, CONFIG, SUMMARY, FILE_NAME)):
        raise ConfigError(f"--output {folder} already holds a run; give another folder, or delete that one")


@dataclass(frozen=True, slots=True)
class Training:
    """Where the training of a run stood: optimizer steps that were done, and what AdamW knew then."""

    step: int
    moments: Moments


def write_grown(
    loaded: LoadedConfig,
    catalogue: Catalogue,
    specs: Specs,
    model: Model,
    receipt: Receipt,
    *,
    training: Training | None = None,
) -> Path:
    """Write the run folder `train.output` of a grown model: config, specs, catalogue, checkpoint, receipt.

    loaded: its configuration; `path` is what a relative `data.root` starts at. training: where its training goes on;
    None: at step 0, with a fresh optimizer. It is then a run like any other: `moemm evaluate` scores it, and
    `moemm train FOLDER/config.yaml --resume` trains it, on any number of ranks.
    Returns the folder. Raises ConfigError where it holds a run or cannot be written, CheckpointError.
    """
    config = loaded.config
    folder = Path(config.train.output)
    check_target(folder)
    store_run(loaded, folder, catalogue, specs)
    weights = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    step = 0 if training is None else training.step

    def write(target: Path) -> list[Path]:
        save_tensors(weights, target / WEIGHTS)
        return [target / WEIGHTS, *([] if training is None else [training.moments.write(target)])]

    def describe(files: dict[str, dict[str, object]]) -> Manifest:
        sparse = config.model.moe == "sparse"
        return Manifest(
            step=step, world_size=0, zero_stage=config.deepspeed.zero_stage, config=to_dict(config),
            config_hash=config_hash(config), versions=versions(), sampler={"step": step},
            expert_map=model.map.to_dict() if sparse else None, files=files,
        )  # fmt: skip

    commit(folder / CHECKPOINTS, step=step, write=write, describe=describe, world=World(), keep=Keep(1))
    receipt.write(folder)
    return folder
