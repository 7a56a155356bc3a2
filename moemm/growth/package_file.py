"""A package as a file: safetensors whose metadata is one JSON text, with a sha256 over every byte. No code is in it.

The sha256 stands in the JSON; it is that of the file with zeros in its place, so that nothing can be changed unseen:
header, JSON, tensors, and what is between them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from moemm.checkpoint.files import sync_file
from moemm.config.suggest import missing_path
from moemm.errors import CheckpointError

FORMAT = 1
KIND = "moemm expert package"
_KEY = "moemm"
_SEAL = "sha256"
_EMPTY = "0" * 64
_MAX_HEADER = 16 * 2**20
_PICKLES = (b"\x80", b"PK", b"c", b"(")
"""How pickles and torch.save's archives begin."""


def write_package(path: Path, content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Write `content` (JSON types) and tensors, whole or not at all; the file's sha256. Raises OSError."""
    text = json.dumps({"kind": KIND, "format": FORMAT, **content, _SEAL: _EMPTY}, sort_keys=True)
    data = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {_KEY: text})
    sealed, seal = _sealed(data, _EMPTY)
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(sealed)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync_file(path.parent)
    return seal


def read_package(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Content and tensors of a package; every byte was checked against its sha256.

    Raises CheckpointError: no such file, no package, another format, or one that was cut short or changed.
    """
    data = _bytes(path)
    text = _metadata(path, data)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise _broken(path, f"its JSON cannot be read ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise _no_package(path, "its metadata is another's")
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {content.get('format')!r}; this version of moemm reads format {FORMAT}: export it anew"
        )
    seal = content.pop(_SEAL, None)
    if not isinstance(seal, str) or len(seal) != len(_EMPTY) or _sealed(data, seal)[1] != seal:
        raise _broken(path, "its bytes do not match its sha256")
    try:
        return {key: value for key, value in content.items() if key not in ("kind", "format")}, load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _broken(path, f"its tensors cannot be read ({error})") from error


def _sealed(data: bytes, before: str) -> tuple[bytes, str]:
    """The file with its sha256 in place of `before`, and that sha256; unchanged, with none, where `before` is not once
    in the header."""
    end = 8 + int.from_bytes(data[:8], "little")
    mark = f'\\"{_SEAL}\\": \\"{before}\\"'.encode()
    if data.count(mark, 0, end) != 1:
        return data, ""
    start = data.index(mark) + len(mark) - 2 - len(before)
    empty = data[:start] + _EMPTY.encode() + data[start + len(before) :]
    seal = hashlib.sha256(empty).hexdigest()
    return data[:start] + seal.encode() + data[start + len(before) :], seal


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise CheckpointError(missing_path(path, what="expert package"))
    if not path.is_file():
        raise _no_package(path, "it is no file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _metadata(path: Path, data: bytes) -> str:
    """The JSON text of the header. Opens nothing else."""
    length = int.from_bytes(data[:8], "little")
    if data.startswith(_PICKLES) and length > len(data):
        raise _no_package(path, "it is a pickle, which could run code; nothing of it was opened")
    if len(data) < 8 or length > _MAX_HEADER or 8 + length > len(data):
        raise _broken(path, f"it has {len(data)} bytes, and its header says that it is {length} long")
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        text = metadata[_KEY]
    except (ValueError, KeyError, TypeError) as error:
        raise _no_package(path, f"its header cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(text, str) or set(metadata) != {_KEY}:
        raise _no_package(path, "its metadata is another's")
    return text


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was cut short or changed: {why}\n  to do: copy it again from where it was exported, or export it anew"
    )


def _no_package(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is no expert package: {why}\n  allowed: a file that `moemm extend export` wrote\n"
        "  to do: export it with `moemm extend export RUN NAME FILE`"
    )
