"""Hook points of training. A callback is one file; it overrides the hooks it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moemm.observe.records import Metrics, RunInfo

if TYPE_CHECKING:
    from moemm.train.trainer import Trainer


class Callback:
    """Called in the order of the list given to the trainer, on rank 0 only unless `every_rank`."""

    every_rank = False
    """True: called on all ranks, which must then do the same collectives."""

    def on_start(self, info: RunInfo) -> None:
        """Before the first step."""

    def on_phase(self, phase: str, step: int) -> None:
        """Before a phase that is no step and may take long, `evaluate` or `save`, after so many steps."""

    def on_step(self, trainer: Trainer, *, stopping: bool) -> None:
        """After each optimizer step, its reports and its evaluation. stopping: no other step follows."""

    def on_metrics(self, metrics: Metrics) -> None:
        """Every train.log_every steps."""

    def on_scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """After an evaluation: task -> metric, value, n."""

    def on_message(self, text: str) -> None:
        """Something a reader should know."""

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Something a program should know: a line for metrics.jsonl, its kind under "event"."""

    def on_finish(self, summary: Mapping[str, Any]) -> None:
        """After the final evaluation of a finished run."""

    def on_close(self) -> None:
        """Always last, also after an error."""
