"""A report as named numbers: what TensorBoard, Weights & Biases and MLflow are given, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moemm.observe.records import Metrics
from moemm.observe.routing import RouterReport, RoutingNames


def scalars_of(metrics: Metrics, names: RoutingNames | None) -> dict[str, float]:
    """Losses, accuracies, speed, and what the routers did where there are some (`names` of a run's RunInfo)."""
    scalars = {
        "train/loss": metrics.loss,
        "train/router_loss": metrics.router_loss,
        "train/lr": metrics.lr,
        "speed/tokens_per_second": metrics.tokens_per_second,
        **{f"loss/{task}": value for task, value in metrics.losses.items()},
        **{f"objective/{name}": value for name, value in metrics.objectives.items()},
        **{f"accuracy/{task}": value for task, value in metrics.accuracy.items()},
        **{f"conflict_cos/{pair}": cos for pair, (cos, _) in metrics.conflict.items()},
        **{f"noisy_pairs/{pair}": share for pair, share in metrics.noisy_pairs.items()},
        **({} if metrics.dropped is None else {"conflict_dropped": metrics.dropped}),
        **{f"conflict_share/{pair}": share for pair, (_, share) in metrics.conflict.items()},
        **{f"loss_weight/{name}": weight for name, weight in metrics.loss_weights.items()},
    }
    if metrics.grad_norm is not None:
        scalars["train/grad_norm"] = metrics.grad_norm
    if names is not None and metrics.routing is not None:
        scalars |= _routing_scalars(names, metrics.routing)
    return scalars


def scalars_of_scores(split: str, scores: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The metric of each task on a split, where it has one."""
    known = {task: score for task, score in scores.items() if score["value"] is not None}
    return {f"{split}_{score['metric']}/{task}": score["value"] for task, score in known.items()}


def _routing_scalars(names: RoutingNames, routing: RouterReport) -> dict[str, float]:
    """Load of each expert, evenness of each modality, dead experts and dropped slots, by layer."""
    found: dict[str, float] = {}
    share_LE, dead_LE = routing.layer_share_LE, routing.dead_LE(names.allowed_LME)
    even_LM, usable_LE = routing.evenness_LM(names.allowed_LME), np.asarray(names.allowed_LME.any(1))
    for number, layer in enumerate(names.layers):
        at = f"layer_{layer}"
        shares = zip(names.experts, share_LE[number], usable_LE[number], strict=True)
        found |= {f"load/{at}/{expert}": float(share) for expert, share, usable in shares if usable}
        even = zip(names.rows, even_LM[number], strict=True)
        found |= {f"evenness/{at}/{row}": float(value) for row, value in even if value == value}
        found[f"dead_experts/{at}"] = float(dead_LE[number].sum())
        if routing.dropped_LM.any():
            dropped = routing.dropped_LM[number].sum()
            found[f"dropped_slots/{at}"] = float(dropped / max(1.0, dropped + routing.load_LME[number].sum()))
    return found
