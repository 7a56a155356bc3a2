"""What runs inside the ranks of test_resharding.py. Arguments and results are JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from jobs import SMALL, build, done

from moemm.checkpoint import read_manifest
from moemm.checkpoint.state import MODEL, OPTIMIZER, Store
from moemm.distributed import World, broadcast_object, connect
from moemm.train.callbacks import CheckpointingCallback

SAVED, LAST = 2, 4
SCALED: dict[str, Any] = {"harmonize": {"scale": "famo"}}
FROZEN: dict[str, Any] = {"train": {"precision": "bf16", "only": ["trunk.*", "heads.*"]}}
ROUND_ROBIN = {"zero_optimization": {"round_robin_gradients": True}}
FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
KINDS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fp32 0": (0, SCALED, {}),
    "fp32 1": (1, SCALED, {}),
    "fp32 1 round robin": (1, SCALED, ROUND_ROBIN),
    "fp32 2": (2, SCALED, {}),
    "fp32 3": (3, SCALED, SMALL),
    "fp32 3 persistent": (3, SCALED, {}),
    "bf16 1": (1, FROZEN, {}),
    "bf16 1 fp32 gradients": (1, FROZEN, FP32_GRADIENTS),
    "bf16 2": (2, FROZEN, {}),
    "bf16 3": (3, FROZEN, SMALL),
}
"""Name -> ZeRO stage, sections, keys of DeepSpeed. Those of a precision differ only in who holds what."""


def trainer_of(folder: Path, world: World, kind: str, name: str, *, resume: bool = False) -> Any:
    stage, sections, extra = KINDS[kind]
    own = {key: dict(section) for key, section in sections.items()}
    train = {**own.pop("train", {}), "steps": LAST}
    return build(
        folder, world, name=name, stage=stage, extra=extra, resume=resume, train=train,
        callbacks=(CheckpointingCallback(every=SAVED),), **own,
    )  # fmt: skip


def content(folder: Path) -> str:
    """SHA-256 of all tensors of a checkpoint, put together, and of AdamW's steps: the same however it is cut."""
    text = hashlib.sha256()
    files = read_manifest(folder).files
    for kind in (MODEL, OPTIMIZER):
        store = Store(folder, files, kind)
        for name in sorted(store.shapes):
            value = store.whole(name)
            text.update(f"{name} {value.dtype} {list(value.shape)}".encode() + value.numpy().tobytes())
        text.update(repr(sorted(store.steps.items())).encode())
    return text.hexdigest()


def begin(folder: str, kinds: list[str]) -> dict[str, Any]:
    """Uninterrupted runs with a checkpoint in the middle: losses, and what that checkpoint holds."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for kind in kinds:
        name = f"{kind} on {world.size}"
        trainer, recorder = trainer_of(Path(folder), world, kind, name)
        trainer.run()
        checkpoint = trainer.setup.checkpoints / f"step_{SAVED:06d}"
        found[name] = [recorder.losses, broadcast_object(content(checkpoint) if world.is_main else "")]
        done(trainer)
    return found


def go_on(folder: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """From the checkpoint of one run on as another kind: what it holds when saved again at once, and losses."""
    world = connect(timeout_s=60)
    found: dict[str, Any] = {}
    for source, kind in pairs:
        name = f"{source} to {kind} on {world.size}"
        trainer, recorder = trainer_of(Path(folder), world, kind, name)
        trainer.restore(Path(folder) / source / "checkpoints" / f"step_{SAVED:06d}", SAVED)
        trainer.save()
        again = broadcast_object(content(trainer.setup.checkpoints / f"step_{SAVED:06d}") if world.is_main else "")
        trainer.run()
        found[name] = [recorder.losses, again]
        done(trainer)
    return found


def both(folder: str, kinds: list[str], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    return begin(folder, kinds) | go_on(folder, pairs)
