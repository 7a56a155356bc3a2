"""What a rank writes into a checkpoint and reads back. With train/engine.py the only importer of deepspeed.

step_000020/model.safetensors             all weights, whole, fp32, where one rank holds them
step_000020/model_00000.safetensors       elsewhere: those that rank 0's part of the optimizer steps, and buffers
step_000020/optimizer_00000.safetensors   AdamW's states of the same elements
step_000020/random_00000.safetensors      random states of rank 0
step_000020/manifest.json
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from moemm.checkpoint import random_state
from moemm.checkpoint.fragments import Fragment, held, release, set_steps, spread
from moemm.checkpoint.manifest import read_manifest
from moemm.checkpoint.state import MODEL, OPTIMIZER, RANDOM, RankState, Store, file_name, gather_state
from moemm.distributed import World, gather_objects
from moemm.errors import CheckpointError

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Share:
    """Which tensors this rank writes of those that several ranks hold: each is written by the lowest rank that has it.

    all_first: rank 0 has them all.
    """

    names: Set[str]
    all_first: bool

    @classmethod
    def of(cls, model: nn.Module, world: World) -> Share:
        """Share of a rank that holds all tensors of `model`, in global names; all ranks call it together."""
        mine = list(model.state_dict())
        lowest: dict[str, int] = {}
        for rank, names in enumerate(gather_objects(mine)):
            for name in names:
                lowest.setdefault(name, rank)
        return cls(frozenset(name for name in mine if lowest[name] == world.rank), not any(lowest.values()))


def rank_state(engine: Any, world: World, share: Share, *, kept: Mapping[str, torch.Tensor] | None) -> RankState:
    """What this rank of a DeepSpeed engine writes now; no rank waits for another. Mostly views of the engine's memory.

    kept: what is written in place of weights that the engine rounded and does not train; None if it rounds none.
    Raises CheckpointError for states that cannot be saved.
    """
    own = (one for one in held(engine, kept) if not one.replicated or one.name in share.names)
    sharded = world.size > 1 and engine.zero_optimization_stage() > 0
    alone = share.all_first and not sharded
    return gather_state(own, rank=world.rank, alone=alone, random=random_state.capture())


def read_rank(
    engine: Any, folder: Path, world: World, *, kept: Mapping[str, torch.Tensor] | None
) -> tuple[dict[str, torch.Tensor] | None, bool]:
    """Load weights, optimizer and random state of this rank from a folder that was verified; all ranks together.

    The folder may be of another world size or ZeRO stage; in another world size random states are left as they are.
    kept: as `rank_state` got it. Returns what it is now, and whether random states were restored.
    Raises CheckpointError on all ranks, before a weight is touched, when one of them lacks something that it needs.
    """
    found, problem = None, None
    try:
        found = _Found.of(engine, folder, world, list(kept or ()))
        problem = found.problem()
    except (CheckpointError, OSError, SafetensorError, ValueError, KeyError) as error:
        problem = str(error) or type(error).__name__
    problems = [f"rank {rank}: {text}" for rank, text in enumerate(gather_objects(problem)) if text]
    if not problems:
        assert found is not None
        problems = _surplus(found)
    if problems or found is None:
        raise CheckpointError(f"{folder} is whole, but its state does not fit this run.\n" + "\n".join(problems))
    stored = found.restore(engine)
    return None if kept is None else stored, found.random is not None


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint's files beside what this rank holds."""

    weights: Store
    moments: Store
    random: dict[str, torch.Tensor] | None
    fragments: list[Fragment]
    kept: list[str]

    @classmethod
    def of(cls, engine: Any, folder: Path, world: World, kept: list[str]) -> _Found:
        manifest = read_manifest(folder)
        same = manifest.world_size == world.size
        random = load_file(folder / file_name(RANDOM, world.rank)) if same else None
        weights, moments = (Store(folder, manifest.files, kind) for kind in (MODEL, OPTIMIZER))
        return cls(weights, moments, random, list(held(engine)), kept)

    def problem(self) -> str | None:
        """The first thing that this rank holds and the files do not, or None."""
        for one in self.fragments:
            floating = one.weight.is_floating_point()
            found = self.weights.problem(one.name, one.shape, one.offset, one.length, floating=floating)
            for key in one.moments:
                name = f"{key}/{one.name}"
                found = found or self.moments.problem(name, one.shape, one.offset, one.length, floating=True)
            if one.moments and one.name not in self.moments.steps:
                found = found or f"{one.name} has no count of steps"
            if found:
                return found
        lacking = sorted(random_state.NAMES - set(self.random or random_state.NAMES))
        return f"the random states lack {lacking[0]}" if lacking else None

    @torch.no_grad()
    def restore(self, engine: Any) -> dict[str, torch.Tensor]:
        """Copy everything into the engine; all ranks together. Returns the kept weights."""
        release(engine)
        set_steps(engine, max(self.moments.steps.values(), default=0.0))
        for one in self.fragments:
            if one.length:
                one.weight.copy_(self.weights.read(one.name, one.offset, one.length))
            for key, value in one.moments.items():
                value.copy_(self.moments.read(f"{key}/{one.name}", one.offset, one.length))
            if one.step is not None and one.replicated:
                one.step.fill_(self.moments.steps[one.name])
        spread(engine)
        if self.random is not None:
            random_state.restore(self.random)
        return {name: self.weights.whole(name) for name in self.kept}


def _surplus(found: _Found) -> list[str]:
    """What the files hold and no rank does; all ranks together."""
    mine = {one.name for one in found.fragments}
    unknown = [set(found.weights.shapes) - theirs for theirs in gather_objects(mine)]
    return [f"{name} is not part of this model" for name in sorted(set.intersection(*unknown))[:_SHOWN]]


def full_weights(model: nn.Module, world: World, *, master: bool) -> dict[str, torch.Tensor]:
    """All weights and persistent buffers, whole, on the CPU, fp32 where floating; empty on ranks other than 0.

    Parameters that rank 0 does not have, experts that are spread over ranks, come from the lowest rank that has them.
    master: take the optimizer's fp32 copies of bf16 weights. Collective: all ranks call it together.
    """
    own: dict[str, torch.Tensor] = {}
    everyone = gather_objects([name for name, _ in model.named_parameters()])
    owner = {name: rank for rank, names in reversed(list(enumerate(everyone))) for name in names}
    for name, parameter in model.named_parameters():
        tensor = _whole(parameter, master)
        if owner[name] == world.rank:
            own[name] = _plain(tensor)
    gathered = _gather(own, owner, world)
    if world.is_main:
        buffers = {name: value for name, value in model.state_dict().items() if name not in owner}
        gathered |= {name: _plain(value) for name, value in buffers.items()}
    return gathered


def _gather(own: dict[str, torch.Tensor], owner: Mapping[str, int], world: World) -> dict[str, torch.Tensor]:
    """The tensors of all ranks on rank 0; nothing on the others."""
    away = sorted(name for name, rank in owner.items() if rank)
    if not away:
        return own if world.is_main else {}
    shapes: dict[str, Any] = {}
    for part in gather_objects({name: (one.shape, one.dtype) for name, one in own.items() if name in set(away)}):
        shapes |= part
    for name in away:
        if world.is_main:
            shape, dtype = shapes[name]
            own[name] = torch.empty(shape, dtype=dtype)
            torch.distributed.recv(own[name], src=owner[name])
        elif owner[name] == world.rank:
            torch.distributed.send(own[name], dst=0)
    return own if world.is_main else {}


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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights and buffers of a verified folder, whole, on the CPU. Raises CheckpointError."""
    store = Store(folder, read_manifest(folder).files, MODEL)
    if not store.shapes:
        raise CheckpointError(f"{folder} holds no weights")
    return {name: store.whole(name) for name in store.shapes}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load the weights of a verified folder into a model that no engine holds. Raises CheckpointError."""
    try:
        model.load_state_dict(read_weights(folder), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit the model of the run's config.yaml: {error}") from error
