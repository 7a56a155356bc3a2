"""The state of one rank as tensors by file, and files of all ranks read as one store. No pickle, and no DeepSpeed.

A tensor that a rank holds whole stands in its file by name and shape. Part of one stands there flat, as name@offset,
and the file's metadata say of which tensor and from where on; so the files need no index beside them, and whoever needs
a run of elements finds it whatever world wrote them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moemm.checkpoint.fragments import MOMENTS, Fragment
from moemm.checkpoint.tensors import save_tensors
from moemm.errors import CheckpointError
from moemm.points import point

Tensors = dict[str, torch.Tensor]
MODEL, OPTIMIZER, RANDOM = "model", "optimizer", "random"
"""Beginnings of the names of files."""
WEIGHTS = f"{MODEL}.safetensors"
"""Name where one rank writes all weights."""
_METADATA, _FRAGMENTS, _STEPS = "moemm", "fragments", "steps"


def file_name(kind: str, rank: int) -> str:
    """Name of a rank's file."""
    return f"{kind}_{rank:05d}.safetensors"


@dataclass(frozen=True, slots=True)
class RankState:
    """What a rank writes: file -> tensors, and file -> metadata."""

    tensors: dict[str, Tensors]
    metadata: dict[str, dict[str, str]]

    def write(self, folder: Path) -> list[Path]:
        """Write the files into `folder`; their paths. Raises OSError."""
        paths = []
        for name, tensors in self.tensors.items():
            path = folder / name
            try:
                save_tensors({key: value.cpu() for key, value in tensors.items()}, path, self.metadata.get(name))
            except SafetensorError as error:
                raise OSError(str(error)) from error
            point("save.file")
            paths.append(path)
        return paths


class HostMemory:
    """Memory that a copy of a rank's state is made in, kept from one copy to the next: pages that are there already are
    written five times as fast as new ones.
    """  # fmt: skip

    def __init__(self) -> None:
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}

    def copy(self, state: RankState) -> RankState:
        """A copy that training does not move; the one before it is overwritten."""
        pinned = torch.cuda.is_available()
        copied: dict[str, Tensors] = {}
        for file, tensors in state.tensors.items():
            copied[file] = {}
            for key, value in tensors.items():
                target = self._tensors.get((file, key))
                if target is None or target.shape != value.shape or target.dtype != value.dtype:
                    target = torch.empty(value.shape, dtype=value.dtype, pin_memory=pinned)
                    self._tensors[file, key] = target
                copied[file][key] = target.copy_(value, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize()
        return RankState(copied, state.metadata)


def gather_state(fragments: Iterable[Fragment], *, rank: int, alone: bool, random: Tensors) -> RankState:
    """The state of fragments that this rank writes; views of the engine's memory where nothing is converted.

    alone: this rank writes all weights.
    """
    weights, moments = _File(), _File()
    for fragment in fragments:
        weights.add(fragment.name, fragment, _plain(fragment.weight))
        for key, value in fragment.moments.items():
            moments.add(f"{key}/{fragment.name}", fragment, value.detach())
        if fragment.step is not None:
            moments.steps[fragment.name] = float(fragment.step)
    files = {WEIGHTS if alone else file_name(MODEL, rank): weights, file_name(OPTIMIZER, rank): moments}
    tensors = {name: file.tensors for name, file in files.items() if file.tensors}
    tensors[file_name(RANDOM, rank)] = random
    return RankState(tensors, {name: files[name].metadata() for name in tensors if name in files})


class _File:
    """Tensors and metadata of one file."""

    def __init__(self) -> None:
        self.tensors: Tensors = {}
        self.steps: dict[str, float] = {}
        self._fragments: dict[str, tuple[str, int, tuple[int, ...]]] = {}

    def add(self, name: str, fragment: Fragment, flat: torch.Tensor) -> None:
        if fragment.whole:
            self.tensors[name] = flat.view(fragment.shape)
            return
        key = f"{name}@{fragment.offset}"
        self.tensors[key] = flat
        self._fragments[key] = (name, fragment.offset, fragment.shape)

    def metadata(self) -> dict[str, str]:
        """One entry, because safetensors writes several in any order; none where the tensors say all."""
        values = {_FRAGMENTS: self._fragments, _STEPS: self.steps}
        return {_METADATA: json.dumps(values)} if any(values.values()) else {}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as fp32, which holds it exactly; all else as it is."""
    half = tensor.is_floating_point() and tensor.element_size() < 4
    return (tensor.float() if half else tensor).detach().contiguous()


@dataclass(frozen=True, slots=True)
class _Piece:
    """`length` elements of a tensor from `offset` on: the tensor `key` of a file, flat."""

    offset: int
    length: int
    file: Path
    key: str
    floating: bool


class Store:
    """The tensors in one kind of file of a checkpoint whose hashes were verified, by name; read where asked for."""

    def __init__(self, folder: Path, files: Iterable[str], kind: str) -> None:
        """files: names of the checkpoint's files. Raises CheckpointError where one cannot be read as safetensors."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, float] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._folder = folder
        self._open: dict[Path, Any] = {}
        for name in sorted(name for name in files if name == f"{kind}.safetensors" or name.startswith(f"{kind}_")):
            try:
                self._index(folder / name)
            except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.offset)

    def _index(self, path: Path) -> None:
        file = self._open[path] = safe_open(path, framework="pt")
        metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        fragments = metadata.get(_FRAGMENTS, {})
        self.steps |= {name: float(step) for name, step in metadata.get(_STEPS, {}).items()}
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(key)
            own = tuple(part.get_shape())
            name, offset, shape = fragments.get(key, (key, 0, own))
            if self.shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise ValueError(f"{name} has the shape {list(shape)}, and {list(self.shapes[name])} elsewhere")
            if not 0 <= int(offset) <= math.prod(shape) - math.prod(own):
                raise ValueError(f"{key} has {math.prod(own)} elements from {offset} on, of {math.prod(shape)}")
            piece = _Piece(int(offset), math.prod(own), path, key, part.get_dtype().startswith(("F", "BF")))
            self._pieces.setdefault(name, []).append(piece)

    def problem(self, name: str, shape: tuple[int, ...], offset: int, length: int, *, floating: bool) -> str | None:
        """Why these elements of a tensor cannot be read, or None. Reads nothing but what was indexed."""
        if name not in self.shapes:
            return f"{name} is not there"
        if self.shapes[name] != shape:
            return f"{name} has the shape {list(self.shapes[name])}, not {list(shape)}"
        pieces = self._pieces[name]
        if any(piece.floating != floating for piece in pieces):
            return f"{name} is {'no' if floating else 'a'} tensor of floating-point numbers"
        reached = offset
        for piece in pieces:
            if piece.offset <= reached:
                reached = max(reached, piece.offset + piece.length)
        if reached < offset + length:
            return f"{name} lacks its elements from {reached} on"
        return None

    def read(self, name: str, offset: int, length: int) -> torch.Tensor:
        """These elements (not none), flat, on the CPU, where `problem` has nothing to say. Raises CheckpointError."""
        parts: list[torch.Tensor] = []
        reached, end = offset, offset + length
        try:
            for piece in self._pieces[name]:
                if piece.offset <= reached < min(end, piece.offset + piece.length):
                    until = min(end, piece.offset + piece.length)
                    flat = self._open[piece.file].get_tensor(piece.key).reshape(-1)
                    parts.append(flat[reached - piece.offset : until - piece.offset])
                    reached = until
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._folder}: {name} cannot be read: {error}") from error
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, name: str) -> torch.Tensor:
        """A tensor in its shape, in memory of its own. Raises CheckpointError where a part is missing."""
        shape, first = self.shapes[name], self._pieces[name][0]
        problem = self.problem(name, shape, 0, math.prod(shape), floating=first.floating)
        if problem:
            raise CheckpointError(f"{self._folder}: {problem}")
        if not math.prod(shape):
            empty: torch.Tensor = self._open[first.file].get_tensor(first.key)
            return empty
        return self.read(name, 0, math.prod(shape)).view(shape).clone()


@dataclass(frozen=True, slots=True)
class Moments:
    """AdamW's states of whole tensors: its count of steps, and exp_avg and exp_avg_sq -> name -> tensor, fp32."""

    steps: float
    values: dict[str, Tensors]

    @classmethod
    def read(cls, folder: Path, files: Iterable[str]) -> Moments | None:
        """Of a checkpoint whose hashes were verified, on the CPU; None where it has none. Raises CheckpointError.

        files: names of the checkpoint's files.
        """
        store = Store(folder, files, OPTIMIZER)
        if not store.shapes:
            return None
        values: dict[str, Tensors] = {key: {} for key in MOMENTS}
        for name in store.shapes:
            key, _, own = name.partition("/")
            values[key][own] = store.whole(name)
        return cls(max(store.steps.values(), default=0.0), values)

    def write(self, folder: Path) -> Path:
        """The file of a rank that holds all of them; its path. Raises OSError."""
        path = folder / file_name(OPTIMIZER, 0)
        tensors = {f"{key}/{name}": value for key, own in self.values.items() for name, value in own.items()}
        names = dict.fromkeys(name for own in self.values.values() for name in own)
        metadata = {_METADATA: json.dumps({_FRAGMENTS: {}, _STEPS: dict.fromkeys(names, self.steps)})}
        save_tensors(tensors, path, metadata)
        return path
