"""What is told of pairs of modalities that look wrong: shares while training, the worst samples at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moemm.data.catalogue import TaskInfo
from moemm.models import Pretext
from moemm.objectives import LabelFree

LISTED = 50
"""Samples of each pair of modalities that the summary names."""


def noisy_shares(pretext: Pretext | None) -> dict[str, float]:
    """"a+b" -> share of the samples seen whose pair looks wrong; empty where that is not estimated."""  # fmt: skip
    if not isinstance(pretext, LabelFree) or pretext.noise is None:
        return {}
    return dict(zip(pretext.pair_names, pretext.noise.shares(), strict=True))


def suspects(pretext: Pretext | None, tasks: Sequence[TaskInfo]) -> list[dict[str, Any]]:
    """For each pair of modalities: how far two groups of losses are apart, and the samples of the highest losses."""
    if not isinstance(pretext, LabelFree) or pretext.noise is None:
        return []
    found = []
    for number, name in enumerate(pretext.pair_names):
        one = pretext.noise.suspects(number, most=LISTED)
        rows = zip(one.task, one.place, one.loss, one.wrong, strict=True)
        samples = [
            {"task": tasks[task].name, "index": index, "loss": round(loss, 4), "wrong": round(wrong, 4)}
            for task, index, loss, wrong in rows
        ]
        found.append({"pair": name, "apart": one.apart, "share": one.share, "seen": one.seen, "samples": samples})
    return found
