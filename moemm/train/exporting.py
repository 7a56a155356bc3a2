"""A trained model as one folder that needs neither the run nor its data: export, and loading for inference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moemm import plugins as plugin_files
from moemm.checkpoint import Manifest, newest_complete, verify
from moemm.checkpoint.files import sha256_file, sync_file
from moemm.checkpoint.manifest import FILE_NAME
from moemm.checkpoint.state import WEIGHTS
from moemm.checkpoint.store import load_weights, read_weights
from moemm.checkpoint.tensors import save_tensors
from moemm.config import load_config
from moemm.errors import CheckpointError, ConfigError
from moemm.evaluate import Predictor
from moemm.train.api import described_run
from moemm.train.setup import CATALOGUE, CHECKPOINTS, CONFIG, MODALITIES

EXPERT_MAP = "expert_map.json"
_DESCRIBED = (CONFIG, MODALITIES, CATALOGUE)


def load(path: Path | str, *, plugins: Sequence[Path | str] = (), device: torch.device | str = "cpu") -> Predictor:
    """A trained model for inference: needs no DeepSpeed, no process group and no data.

    path: a folder that `export_run` wrote, a run folder (its newest complete checkpoint), or one of its checkpoints.
    plugins: Python files to run in place of the folder's own copies; moemm/plugins.py says when it runs these.
    Every hash is verified before anything else is read. Raises CheckpointError: nothing there, or files that are not
    as they were written; ConfigError: code that this user has not run before.
    """
    folder, checkpoint, manifest = trained(Path(path))
    run = described_run(folder, plugins, manifest.step)
    load_weights(run.model, checkpoint)
    run.model.to(device)
    return Predictor(run)


def export_run(path: Path | str, output: Path | str) -> Manifest:
    """Write a trained model into the folder `output`, which must not be there; its manifest.

    model.safetensors (all weights, whole, fp32), config.yaml, modalities.json (statistics and vocabularies),
    catalogue.json (tasks, classes, modalities), expert_map.json, plugins/ where the run has code of its own, and
    manifest.json with the sha256 of each. Nothing is pickled.
    path: as that of `load`. Raises CheckpointError, and ConfigError where `output` is there or cannot be written.
    """
    folder, checkpoint, manifest = trained(Path(path))
    target = Path(output)
    if target.exists():
        raise ConfigError(f"{target} is there already; give another folder, or delete that one")
    aside = target.with_name(target.name + ".tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        written = _write(folder, checkpoint, manifest, aside)
        os.rename(aside, target)
        sync_file(target.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ConfigError(f"cannot write {target}: {error.strerror or error}") from error
    return written


def trained(path: Path) -> tuple[Path, Path, Manifest]:
    """Where a model is described, where its weights are (every hash verified), and their manifest; see `load`."""
    if (path / FILE_NAME).is_file():
        exported = (path / CONFIG).is_file()
        return path if exported else path.parent.parent, path, verify(path)
    if (path / CHECKPOINTS).is_dir():
        found = newest_complete(path / CHECKPOINTS)
        return path, found.folder, found.manifest
    raise CheckpointError(
        f"{path} holds no trained model\n"
        f"  allowed: a folder that `moemm export` wrote, a run folder with {CHECKPOINTS}/, or a checkpoint of one"
    )


def _write(folder: Path, checkpoint: Path, manifest: Manifest, aside: Path) -> Manifest:
    for name in _DESCRIBED:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: it is no run folder, or not whole")
        shutil.copyfile(folder / name, aside / name)
    for code in load_config(folder / CONFIG).plugin_files:
        (aside / plugin_files.FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(code, aside / plugin_files.FOLDER / code.name)
    save_tensors(read_weights(checkpoint), aside / WEIGHTS)
    (aside / EXPERT_MAP).write_text(json.dumps(manifest.expert_map, indent=1) + "\n", encoding="utf-8")
    written = replace(manifest, files={path.relative_to(aside).as_posix(): _entry(path) for path in _files(aside)})
    written.write(aside)
    return written


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _entry(path: Path) -> dict[str, Any]:
    sync_file(path)
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}
