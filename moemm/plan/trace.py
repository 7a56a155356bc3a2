"""What the routers of a run did, window by window, as metrics.jsonl has it. Numbers on the CPU, no torch.

W windows (the steps between two reports), L layers with a router, M rows of the expert map, E routed experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moemm.errors import CheckpointError

FILE = "metrics.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """load_WLME: how often an expert was chosen. tokens_WM: tokens. steps_W: of each window; ends_W: its last step.

    layers: numbers of the blocks; rows, experts: names, as metrics.jsonl has them.
    """

    layers: tuple[int, ...]
    rows: tuple[str, ...]
    experts: tuple[str, ...]
    load_WLME: np.ndarray
    tokens_WM: np.ndarray
    steps_W: np.ndarray
    ends_W: np.ndarray

    def __len__(self) -> int:
        return len(self.steps_W)

    def part(self, chosen: slice) -> Trace:
        """Some of the windows."""
        arrays = {name: getattr(self, name)[chosen] for name in ("load_WLME", "tokens_WM", "steps_W", "ends_W")}
        return replace(self, **arrays)

    def late(self, share: float) -> Trace:
        """The windows of the last `share` of the steps: routing has settled there."""
        first = int(np.searchsorted(self.ends_W, (1 - share) * self.ends_W[-1], side="right"))
        return self.part(slice(min(first, len(self) - 1), None))

    def tokens_a_sample(self, batch_size: int) -> dict[str, float]:
        """Modality -> tokens in the trunk, over all samples of the mixture."""
        mean_M = self.tokens_WM.sum(0) / (self.steps_W.sum() * batch_size)
        found: dict[str, float] = {}
        for row, count in zip(self.rows, mean_M.tolist(), strict=True):
            modality = row.partition(" in ")[0]
            found[modality] = found.get(modality, 0.0) + count
        return found


def read_trace(folder: Path) -> Trace:
    """The record of a run. Raises CheckpointError where there is none, or it holds no routing."""
    path = folder / FILE
    try:
        names, windows = _read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as the record of a run ({error})") from error
    if names is None or len(windows) < 2:
        raise CheckpointError(
            f"{path} holds {len(windows)} windows of routing, and two are needed: the model has no router, or the run "
            "was too short\n  to do: train with routed experts, and with a smaller train.log_every"
        )
    axes: Any = {key: tuple(names[key]) for key in ("layers", "rows", "experts")}
    ends_W = np.array([window["step"] for window in windows])
    return Trace(
        **axes,
        load_WLME=np.array([window["load"] for window in windows], float),
        tokens_WM=np.array([window["tokens"] for window in windows], float),
        steps_W=np.diff(ends_W, prepend=0),
        ends_W=ends_W,
    )


def read_rate(folder: Path) -> float:
    """Tokens a second of one rank, the median of a run's reports but the first. Raises CheckpointError."""
    try:
        found = [line["tokens_per_second"] for line in _lines(folder / FILE) if line.get("event") == "train"]
        newest = max((folder / "checkpoints").glob("step_*/manifest.json"), key=lambda path: path.parent.name)
        ranks = int(json.loads(newest.read_text(encoding="utf-8"))["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: the rate of the run is not known: {FILE} or the newest manifest of its checkpoints cannot be "
            f"read ({error})\n  to do: give --efficiency"
        ) from error
    if len(found) < 2:
        raise CheckpointError(f"{folder / FILE} holds {len(found)} reports, and two are needed: give --efficiency")
    return float(np.median(found[1:])) / ranks


def _read(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    names: dict[str, Any] | None = None
    windows: list[dict[str, Any]] = []
    for line in _lines(path):
        if line.get("event") == "routing_names":
            names = line
        elif line.get("event") == "routing" and (not windows or line["step"] > windows[-1]["step"]):
            windows.append(line)
    return names, windows


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            return  # the last line, cut short by a crash
