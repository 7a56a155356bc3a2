"""A receipt: what an operation changed, and what it proved, with numbers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moemm.checkpoint.files import write_text_atomic
from moemm.checkpoint.manifest import versions
from moemm.errors import CheckpointError

FILE_NAME = "receipt.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """One number that was measured on the new model. most, least: where it has to lie; None: it is only told."""

    what: str
    value: float
    most: float | None = None
    least: float | None = None

    @property
    def ok(self) -> bool | None:
        """Whether it lies there; None where nothing is asked of it. What is not a number never does."""
        if self.most is None and self.least is None:
            return None
        return (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Parameters of a model: all, and those that a token and its task's head pass through at most."""

    total: int
    active: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What was done to which models.

    operation: `upcycle copy`. sources: folder, step and `weights_hash` of each model that was read. target: folder.
    changed: lines for the user: what was made, copied, drawn, left out. before, after: sizes. optimizer: whether its
    state was kept, and why not. details: what the operation itself has to read again. history: the receipts of the
    model that was read, oldest first.
    """

    operation: str
    sources: list[dict[str, Any]]
    target: str
    changed: list[str]
    proofs: list[Proof]
    before: Size
    after: Size
    optimizer: str
    details: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every proof that something is asked of holds."""
        return all(proof.ok is not False for proof in self.proofs)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with whether each proof holds and the versions that computed it."""
        values = asdict(self)
        for entry, proof in zip(values["proofs"], self.proofs, strict=True):
            entry["ok"] = proof.ok
            if not math.isfinite(proof.value):
                entry["value"] = None
        return {"format": FORMAT, **values, "ok": self.ok, "versions": versions()}

    def write(self, folder: Path) -> Path:
        """Write receipt.json into `folder`. Raises OSError."""
        path = folder / FILE_NAME
        write_text_atomic(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a run folder as JSON types; None where the run did not grow out of another.

    Raises CheckpointError where it cannot be read.
    """
    path = folder / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; put it back from a copy") from error
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no receipt of format {FORMAT}, which this version of moemm reads")
    return dict(values)


def lineage(folder: Path) -> list[dict[str, Any]]:
    """The receipts of a run and of those that it grew out of, oldest first. Raises as `read_receipt`."""
    own = read_receipt(folder)
    if own is None:
        return []
    history: list[dict[str, Any]] = own.pop("history")
    return [*history, own]


def weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256, in hex, of names, types, shapes and bytes of the tensors; their order does not matter."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
