"""What a rank writes into a checkpoint and reads back. With train/engine.py the only importer of deepspeed.

step_000020/model.safetensors          all weights, whole, fp32: what evaluate and export read
step_000020/random_00000.safetensors   random states of rank 0
step_000020/engine/*.pt                DeepSpeed's own shards (pickles: opened only after their hashes are checked)
step_000020/manifest.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moemm.checkpoint import random_state
from moemm.checkpoint.manifest import ENGINE
from moemm.distributed import World, gather_objects
from moemm.errors import CheckpointError
from moemm.points import point

WEIGHTS = "model.safetensors"


def write_rank(
    engine: Any, folder: Path, world: World, *, kept: Mapping[str, torch.Tensor] | None = None
) -> Sequence[Path]:
    """Write this rank's files of a DeepSpeed engine into `folder`; all ranks call it together.

    kept: weights that are written in place of the engine's, which rounded them and does not train them.
    Returns the paths. Raises OSError on the rank that could not write, after all ranks are through their collectives.
    """
    writer = _Writer()
    weights = full_weights(engine.module, world, master=engine.bfloat16_enabled()) | {**(kept or {})}
    _save_engine(engine, folder, writer)
    path = folder / f"random_{world.rank:05d}.safetensors"
    writer.attempt(path, lambda: save_file(random_state.capture(), path))
    if world.is_main:
        target = folder / WEIGHTS
        writer.attempt(target, lambda: save_file(weights, target))
    if writer.problem is not None:
        raise OSError(str(writer.problem))
    return writer.paths


def _save_engine(engine: Any, folder: Path, writer: _Writer) -> None:
    previous = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    # Rank 0 alone would copy two scripts here, which may fail, before a barrier; model.safetensors makes them needless.
    engine._copy_recovery_script = lambda _: None
    try:
        engine.save_checkpoint(str(folder), tag=ENGINE, save_latest=False)
    finally:
        engine.checkpoint_engine = previous


class _Writer:
    """Stands in for DeepSpeed's checkpoint engine while a checkpoint is written.

    DeepSpeed's save holds barriers: a rank that raised in the middle would leave the others waiting. So failures are
    kept until all ranks are through.
    """

    def __init__(self) -> None:
        self.paths: list[Path] = []
        self.problem: Exception | None = None

    def attempt(self, path: Path, write: Any) -> None:
        """Run `write` and note `path`, or the failure."""
        try:
            write()
            point("save.file")
            self.paths.append(path)
        except (OSError, RuntimeError, SafetensorError) as error:
            self.problem = self.problem or error

    def save(self, state_dict: Any, path: str) -> None:
        """Called by DeepSpeed for each of its files."""
        self.attempt(Path(path), lambda: torch.save(state_dict, path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Called by DeepSpeed for its folders."""
        try:
            Path(path).mkdir(parents=True, exist_ok=exist_ok)
        except OSError as error:
            self.problem = self.problem or error

    def create(self, info: Any) -> None:
        """Called by DeepSpeed before the first file; nothing to prepare."""

    def commit(self, info: Any) -> bool:
        """Called by DeepSpeed after the last file; our own commit follows."""
        return True

    def is_decoupled(self) -> bool:
        """Files are written when `save` returns."""
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Rank 0 of the data-parallel ranks writes what they share."""
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        """torch.save writes a shared storage once, whole."""
        return True


def full_weights(model: nn.Module, world: World, *, master: bool) -> dict[str, torch.Tensor]:
    """All weights and persistent buffers, whole, on the CPU, fp32 where floating; empty on ranks other than 0.

    master: take the optimizer's fp32 copies of bf16 weights. Collective: all ranks call it together.
    """
    parameters = dict(model.named_parameters())
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensor = _whole(parameter, master)
        if world.is_main:
            gathered[name] = _plain(tensor)
    if world.is_main:
        buffers = {name: value for name, value in model.state_dict().items() if name not in parameters}
        gathered |= {name: _plain(value) for name, value in buffers.items()}
    return gathered


def _whole(parameter: nn.Parameter, master: bool) -> torch.Tensor:
    if master and parameter.requires_grad:
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(parameter)
        if full is not None:
            return full
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().cpu()
    return (plain.float() if plain.is_floating_point() else plain).clone().contiguous()


def read_rank(engine: Any, folder: Path, world: World) -> None:
    """Load weights, optimizer and random state of this rank from a folder that was verified; all ranks together.

    Raises CheckpointError on all ranks when one of them cannot use its files.
    """
    problem = None
    try:
        if engine.load_checkpoint(str(folder), tag=ENGINE)[0] is None:
            problem = "DeepSpeed found no state for this rank"
        random_state.restore(load_file(folder / f"random_{world.rank:05d}.safetensors"))
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(problem)) if text]
    if problems:
        raise CheckpointError(f"{folder} is whole, but its state does not fit this run.\n" + "\n".join(problems))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of `model.safetensors` of a verified folder, on the CPU. Raises CheckpointError."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `model.safetensors` of a verified folder into a model that no engine holds. Raises CheckpointError."""
    try:
        model.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} does not fit the model of the run's config.yaml: {error}") from error
