"""What is proved of an extension: old tensors keep their bytes, old outputs their bits; or how much was forgotten."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moemm.data.pack import Packer
from moemm.data.sample import PackedBatch
from moemm.errors import CheckpointError
from moemm.evaluate import evaluate_run
from moemm.growth.extension_trial import draw
from moemm.growth.grown import Base, read_base
from moemm.growth.receipt import FILE_NAME, Proof, Receipt, Size, read_receipt, weights_hash
from moemm.modalities import prepare_functions

OPERATION = "extend"
SAMPLES = 64
"""Samples of each old task whose outputs are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension(Receipt):
    """The receipt of an extension; `details` holds the plan, without its configuration, and that of the base."""

    def verify(self, batches: Sequence[PackedBatch] = ()) -> list[Proof]:
        """Compare the run as it is now with its base again; `batches`: as the base's catalogue packs them.

        When none are given samples of the old tasks are drawn. Raises CheckpointError where a proof fails, or where one
        of the two runs is no longer what the receipt says.
        """
        source = self.sources[0]
        base = read_base(source["folder"])
        if weights_hash(base.weights) != source["sha256"]:
            raise CheckpointError(
                f"{source['folder']} is not what {self.target} was extended from: its weights have another sha256\n"
                "  to do: put its checkpoint back from a copy; without it nothing can be compared"
            )
        proofs = compare(base, read_base(self.target), self.details, batches)
        failed = [proof.what for proof in proofs if proof.ok is False]
        if failed:
            raise CheckpointError(f"{self.target} is no longer an extension of {source['folder']}: {'; '.join(failed)}")
        return proofs


def read_extension(folder: Path) -> Extension:
    """The receipt of an extended run. Raises CheckpointError for a run that is none."""
    values = read_receipt(folder)
    if values is None or values["operation"] != OPERATION:
        what = "no receipt" if values is None else f"the receipt of {values['operation']}"
        raise CheckpointError(f"{folder} is no extended run: it has {what}; give a folder that `moemm extend` wrote")
    names = Receipt.__dataclass_fields__
    given = {key: value for key, value in values.items() if key in names}
    proofs = [
        Proof(
            what=one["what"],
            value=math.nan if one["value"] is None else one["value"],
            most=one["most"],
            least=one["least"],
        )
        for one in values["proofs"]
    ]
    sizes = {key: Size(**values[key]) for key in ("before", "after")}
    return Extension(**{**given, **sizes, "proofs": proofs, "history": values["history"]})


def rewrite(receipt: Extension) -> None:
    """Put the receipt into its run folder again. Raises CheckpointError."""
    try:
        receipt.write(Path(receipt.target))
    except OSError as error:
        raise CheckpointError(f"{receipt.target}/{FILE_NAME} cannot be written: {error}") from error


def compare(base: Base, grown: Base, details: Mapping[str, Any], batches: Sequence[PackedBatch] = ()) -> list[Proof]:
    """Proofs of an extended run against its base. details: `touched` and `unfrozen` of the plan."""
    frozen = not details["unfrozen"]
    changed = [name for name, value in base.weights.items() if not _same(value, grown.weights.get(name))]
    found = [
        Proof(what="old tensors whose bytes are not those of before", value=len(changed), most=0 if frozen else None)
    ]
    differ = _differing(base, grown, batches or old_batches(base))
    for name, number in differ.items():
        kept = frozen and name not in details["touched"]
        found.append(Proof(what=f"outputs of {name} that changed a bit", value=number, most=0 if kept else None))
    return found


def changed_outputs(base: Base, grown: Base, touched: Sequence[str]) -> int:
    """How many outputs of the old tasks that are not touched differ."""
    differ = _differing(base, grown, old_batches(base))
    return sum(number for name, number in differ.items() if name not in touched)


def old_batches(base: Base) -> list[PackedBatch]:
    """A batch of each task of the base, of split val."""
    run = base.run
    packer = Packer(run.catalogue, prepare_functions(run.specs))
    tasks = [task for task in run.catalogue.tasks if task.drawn_with is None]
    return [packer(draw(run.catalogue, task, "val", (), SAMPLES, run.config.train.seed)) for task in tasks]


def widened(batch: PackedBatch, grown: Base) -> PackedBatch:
    """A batch of the base as the catalogue of the extended run would have packed it."""
    run = grown.run
    empty = Packer(run.catalogue, prepare_functions(run.specs))([])
    modalities = {name: batch.modalities.get(name, packed) for name, packed in empty.modalities.items()}
    presence = batch.presence.new_zeros(batch.num_samples, len(modalities))
    for column, packed in enumerate(modalities.values()):
        presence[packed.sample, column] = True
    return replace(batch, modalities=modalities, presence=presence, targets={**empty.targets, **batch.targets})


@torch.no_grad()
def _differing(base: Base, grown: Base, batches: Sequence[PackedBatch]) -> dict[str, int]:
    """Old task -> outputs that differ. Both models are in eval mode, on the CPU."""
    names = [task.name for task in base.run.catalogue.tasks]
    if names != [task.name for task in grown.run.catalogue.tasks][: len(names)]:
        raise CheckpointError(f"{grown.run.folder} does not have the tasks of {base.run.folder} before its own")
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        before, after = base.run.model(batch).outputs, grown.run.model(widened(batch, grown)).outputs
        for name in names:
            counts[name] += int((before[name] != after[name]).sum())
    return counts


def _same(before: torch.Tensor, after: torch.Tensor | None) -> bool:
    if after is None or after.dtype != before.dtype or after.shape != before.shape:
        return False
    return weights_hash({"": before}) == weights_hash({"": after})


def scores(base: Base, grown: Base, details: Mapping[str, Any]) -> list[Proof]:
    """Scores of all tasks of the extended run, on split test if each task has samples of it, else on val.

    Of tasks that may have changed also what was forgotten: the score of before less that of now (more for metrics where
    less is better says that it was learned).
    """
    split = "test" if all(task.sizes["test"] for task in grown.run.catalogue.tasks) else "val"
    after = evaluate_run(grown.run, split=split)["tasks"]
    may_change = base.run.catalogue.tasks if details["unfrozen"] else ()
    names = {task.name for task in may_change} | set(details["touched"])
    before = evaluate_run(base.run, split=split)["tasks"] if names else {}
    found = []
    for name, score in after.items():
        found.append(Proof(what=f"{name}: {score['metric']} on {split}", value=score["value"]))
        if name in names:
            lost = before[name]["value"] - score["value"]
            found.append(Proof(what=f"{name}: {score['metric']} forgotten", value=lost))
    return found
