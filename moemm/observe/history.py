"""The course of a run, read back from metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moemm.errors import CheckpointError
from moemm.observe.routing import RouterReport, RoutingNames

Points = list[tuple[float, float]]


@dataclass
class History:
    """losses: task -> (step, mean loss); objectives: the same of those without labels.
    conflict: "a | b" -> (step, mean cosine of the gradients of two losses, share of negative ones).
    loss_weights: loss -> (step, weight by `harmonize.scale`).
    scores: (split, task) -> (step, score). messages: lines for the reader.
    routing: (step, what the routers did up to it since the one before), in order; names: its axes.
    """

    losses: dict[str, Points] = field(default_factory=dict)
    objectives: dict[str, Points] = field(default_factory=dict)
    conflict: dict[str, list[tuple[float, float, float]]] = field(default_factory=dict)
    loss_weights: dict[str, Points] = field(default_factory=dict)
    scores: dict[tuple[str, str], Points] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    routing: list[tuple[int, RouterReport]] = field(default_factory=list)
    names: RoutingNames | None = None

    @classmethod
    def read(cls, path: Path) -> History:
        """Read a file; a last line cut short by a crash is passed over. Raises CheckpointError for another file."""
        history = cls()
        try:
            for values in _events(path):
                history._add(values)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path} cannot be read as the course of a run ({type(error).__name__}: {error}); put it back from a "
                "copy, or train anew in another folder"
            ) from error
        return history

    def recent(self, share: float) -> tuple[int, RouterReport] | None:
        """(first step not included, sum) of the routing in the last `share` of the steps; None without any."""
        if not self.routing:
            return None
        bound = (1 - share) * self.routing[-1][0]
        chosen = [(step, report) for step, report in self.routing if step > bound]
        before = [step for step, _ in self.routing if step <= bound]
        total = chosen[0][1]
        for _, report in chosen[1:]:
            total = total + report
        return (before[-1] if before else 0), total

    def _add(self, values: dict[str, Any]) -> None:
        event, step = values.get("event"), int(values.get("step", 0))
        if event == "train":
            for task, loss in values["losses"].items():
                self.losses.setdefault(task, []).append((step, _number(loss)))
            for name, loss in values.get("objectives", {}).items():
                self.objectives.setdefault(name, []).append((step, _number(loss)))
            for pair, (cos, share) in values.get("conflict", {}).items():
                self.conflict.setdefault(pair, []).append((step, _number(cos), _number(share)))
            for name, weight in values.get("loss_weights", {}).items():
                self.loss_weights.setdefault(name, []).append((step, _number(weight)))
        elif event == "scores":
            for task, score in values["scores"].items():
                self.scores.setdefault((values["split"], task), []).append((step, _number(score["value"])))
        elif event == "message":
            self.messages.append(str(values["text"]))
        elif event == "routing_names":
            self.names = RoutingNames.from_dict(values)
        elif event == "routing":
            self.routing.append((step, RouterReport.from_dict(values)))


def _events(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except ValueError:
            if number + 1 < len(lines):
                raise


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
