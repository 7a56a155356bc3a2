"""What training reports, as plain values: the writers of this package know nothing of the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moemm.observe.routing import RouterReport, RoutingNames


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Means over the steps since the last report, over all ranks.

    loss: the objective, all losses included. losses, accuracy: task -> mean over its samples (accuracy: of
    classification only). objectives: name -> mean over the samples that it concerns, of those without labels.
    missing_loss: of the regression of absent modalities, 0 without one. Tasks and objectives without a sample in the
    window are missing. routing: what the routers did; None without one. conflict: "a | b" -> (mean cosine of the
    gradients of two losses, share of the samples or groups where it is negative), where `harmonize` looks at them.
    loss_weights: loss -> its mean weight by `harmonize.scale`, where there is one. dropped: share of samples that
    `harmonize.method` left out, if it does. noisy_pairs: "a+b" -> share of the training samples whose pair of these
    modalities looks wrong, where that is estimated.
    """

    step: int
    total_steps: int
    loss: float
    router_loss: float
    losses: dict[str, float]
    accuracy: dict[str, float]
    lr: float
    grad_norm: float | None
    tokens_per_second: float
    seconds: float
    seconds_left: float
    missing_loss: float = 0.0
    objectives: dict[str, float] = field(default_factory=dict)
    routing: RouterReport | None = None
    conflict: dict[str, tuple[float, float]] = field(default_factory=dict)
    loss_weights: dict[str, float] = field(default_factory=dict)
    dropped: float | None = None
    noisy_pairs: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the routing, as JSON types."""
        skipped = ("routing",)
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in skipped}
        return {"event": "train", **values}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a writer must know before the first report. folder: of the run; start_step: 0, or where a resume begins."""

    name: str
    folder: str
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    start_step: int
    total_steps: int
    facts: dict[str, str] = field(default_factory=dict)
    routing: RoutingNames | None = None
