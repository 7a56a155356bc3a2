"""A step whose loss or gradient is not finite: what breaks it is left out on all ranks alike, the rest is applied.

Nothing that is not finite may be joined with gradients that are: 0 times NaN is NaN. So an attempt at a step that turns
out to be broken is thrown away, and the step is tried again without one modality or one task, as if it had been absent
from that step's samples: first without what is known to be broken (inputs that are infinite, a task whose outputs are
finite and its loss is not), then without each modality and each task in turn. If no attempt is finite, the step is left
out as a whole. All ranks take the same way, because they have exchanged what they found; the random numbers are those
of the first attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moemm.data.catalogue import Catalogue
from moemm.data.leave_out import leave_out
from moemm.data.sample import PackedBatch
from moemm.distributed import gather_objects
from moemm.errors import HealthError
from moemm.train.health import SHOWN, Finding, Named, named

_LISTED = 64
"""Samples that are listed in metrics.jsonl."""
_ADVICE = {
    "loss": "Look at these samples (moemm data validate FILE); if they are fine, lower train.lr or raise train.warmup",
    "gradient": "Lower train.lr, raise train.warmup, or train in fp32 (train.precision)",
    "spike": "Look at the data of these steps; if it is fine, lower train.lr, or raise train.health.spike",
}


class LeftOut(NamedTuple):
    """What a step is done without."""

    modalities: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [("modality", name) for name in self.modalities] + [("task", name) for name in self.tasks]
        return " and ".join(f"{kind} {name}" for kind, name in parts)


NOTHING = LeftOut()


class FaultyStepError(Exception):
    """Of an attempt at a step that must not be applied; raised on all ranks alike.

    what: key of the advice. text: one line. lines: what the ranks found. candidates: what to try without, in order.
    """

    def __init__(self, what: str, text: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(text)
        self.what, self.text = what, text
        self.lines = [
            f"rank {rank}, {', '.join(one.broken)}: {line}"
            for rank, one in enumerate(findings)
            for line in one.lines[:SHOWN]
        ]
        self.samples = list(dict.fromkeys(sample for one in findings for sample in one.samples))
        self.candidates = [
            LeftOut(modalities=tuple(dict.fromkeys(name for one in findings for name in one.modalities))),
            LeftOut(tasks=tuple(dict.fromkeys(name for one in findings for name in one.tasks))),
        ]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a faulty step. left: what it was done without; None: it was not done at all. lines: for people."""

    step: int
    what: str
    text: str
    lines: tuple[str, ...]
    left: LeftOut | None
    samples: tuple[Named, ...]
    in_a_row: int

    @property
    def message(self) -> str:
        """For people."""
        done = "the whole step was left out" if self.left is None else f"{self.left} was left out of it on all ranks"
        shown = ", ".join(f"{task} {index}" for task, index in self.samples[:SHOWN])
        more = f" and {len(self.samples) - SHOWN} more" if len(self.samples) > SHOWN else ""
        found = "".join(f"\n  {line}" for line in self.lines)
        seen = f" Samples: {shown}{more}." if shown else ""
        return f"warning: {self.text}: {done}.{seen}{found}"

    def to_dict(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        left = None if self.left is None else {"modalities": list(self.left.modalities), "tasks": list(self.left.tasks)}
        return {
            "event": "left_out",
            "step": self.step,
            "what": self.what,
            "left_out": left,
            "num_samples": len(self.samples),
            "samples": [list(sample) for sample in self.samples[:_LISTED]],
            "in_a_row": self.in_a_row,
        }


class Mender:
    """Does steps so that what is not finite is left out. most: faulty steps in a row that stop training."""

    def __init__(self, catalogue: Catalogue, *, most: int, device: torch.device) -> None:
        self._tasks, self._most, self._device = catalogue.tasks, most, device
        self.in_a_row, self.total = 0, 0

    def step(
        self, step: int, draw: Callable[[], PackedBatch], attempt: Callable[[Batches], None], undo: Callable[[], None]
    ) -> Outcome | None:
        """Do step `step` (1-based) by `attempt`, more than once if need be; None if it went well at once.

        draw: the next micro-batch. attempt: everything up to the optimizer's step; raises FaultyStepError where it must
        not be applied. undo: forgets the gradients of a failed attempt. All ranks together.
        Raises HealthError on all ranks where too many steps in a row are faulty; nothing of this one is applied then.
        """
        batches, random = Batches(draw), _random_state(self._device)
        try:
            attempt(batches)
        except FaultyStepError as error:
            fault = error.with_traceback(None)  # frames hold the graph of the failed attempt
        else:
            self.in_a_row = 0
            return None
        undo()
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.in_a_row >= self._most:
            raise _too_many(fault, self.in_a_row)
        left = self._without(fault, batches, attempt, undo, random)
        samples = tuple(fault.samples) or batches.samples_of(left, self._tasks)
        return Outcome(step, fault.what, fault.text, tuple(fault.lines), left, samples, self.in_a_row)

    def _without(
        self,
        fault: FaultyStepError,
        batches: Batches,
        attempt: Callable[[Batches], None],
        undo: Callable[[], None],
        random: list[torch.Tensor],
    ) -> LeftOut | None:
        for left in self._candidates(fault, batches):
            batches.leave_out(left, self._tasks)
            if not batches.any_left():
                continue
            _restore_random_state(random)
            try:
                attempt(batches)
            except FaultyStepError:
                undo()
            else:
                return left
        return None

    def _candidates(self, fault: FaultyStepError, batches: Batches) -> Iterator[LeftOut]:
        if fault.what == "spike":
            return
        modalities, tasks = batches.present(self._tasks)
        every = [
            *fault.candidates,
            *(LeftOut((name,)) for name in modalities),
            *(LeftOut((), (name,)) for name in tasks),
        ]
        yield from (left for left in dict.fromkeys(every) if left != NOTHING)


class Batches:
    """The micro-batches of a step on this rank, kept until it is done; by number, drawn when first asked for."""

    def __init__(self, draw: Callable[[], PackedBatch]) -> None:
        self._draw, self._drawn = draw, list[PackedBatch]()
        self._change: Callable[[PackedBatch], PackedBatch] = lambda batch: batch

    def __getitem__(self, micro: int) -> PackedBatch:
        while len(self._drawn) <= micro:
            self._drawn.append(self._draw())
        return self._change(self._drawn[micro])

    def leave_out(self, left: LeftOut, tasks: Sequence[Any]) -> None:
        """From now on give the batches without this."""
        self._change = lambda batch: leave_out(batch, tasks, modalities=left.modalities, tasks=left.tasks)

    def any_left(self) -> bool:
        """Whether some rank has a sample in what was drawn; all ranks ask together."""
        return any(gather_objects(sum(self._change(batch).num_samples for batch in self._drawn)))

    def present(self, tasks: Sequence[Any]) -> tuple[list[str], list[str]]:
        """Modalities and tasks of which some rank has a sample in what was drawn; all ranks ask together."""
        modalities = {name for batch in self._drawn for name, one in batch.modalities.items() if len(one)}
        own = {task.name for batch in self._drawn for task in tasks if len(batch.targets[task.name])}
        everyone = gather_objects((sorted(modalities), sorted(own)))
        found = [{name for rank in everyone for name in rank[part]} for part in (0, 1)]
        return sorted(found[0]), sorted(found[1])

    def samples_of(self, left: LeftOut | None, tasks: Sequence[Any]) -> tuple[Named, ...]:
        """Samples of all ranks that have one of these modalities or are of one of these tasks; all for None."""
        found: list[Named] = []
        for batch in self._drawn:
            wanted = torch.full_like(batch.task, left is None, dtype=torch.bool)
            if left is not None:
                for column, name in enumerate(batch.modalities):
                    if name in left.modalities:
                        wanted |= batch.presence[:, column]
                for number, task in enumerate(tasks):
                    if task.name in left.tasks:
                        wanted |= batch.task == number
            found += named(batch, tasks, wanted)
        return tuple(sample for rank in gather_objects(found) for sample in rank)


def _too_many(fault: FaultyStepError, in_a_row: int) -> HealthError:
    found = "".join(f"\n  {line}" for line in fault.lines)
    times = f" {in_a_row} steps in a row were faulty (train.health.max_faulty)." if in_a_row > 1 else ""
    return HealthError(
        f"{fault.text}{':' if found else '.'}{found}\nNothing of this step was applied or saved.{times} "
        f"{_ADVICE[fault.what]}, and go on from the last checkpoint with --resume."
    )


def _random_state(device: torch.device) -> list[torch.Tensor]:
    own = [torch.get_rng_state()]
    return [*own, torch.cuda.get_rng_state(device)] if device.type == "cuda" else own


def _restore_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for one in state[1:]:
        torch.cuda.set_rng_state(one)
