"""TensorBoard: losses, accuracies, scores, and what the routers do: scalars, charts of them, and heat maps."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moemm.observe.heatmap import draw_heatmap
from moemm.observe.records import Metrics, RunInfo
from moemm.observe.routing import RouterReport, RoutingNames
from moemm.observe.scalars import scalars_of, scalars_of_scores

PICTURE_SHARE = 0.005
"""Share of a run's time that heat maps may take: the next ones wait until the last have been paid for."""


class TensorBoard:
    """Writes event files into `folder`. `info.start_step`: events of later steps from before a resume are hidden.

    The Custom Scalars tab has one chart a layer with the load of each expert over time, the evenness of each modality,
    dead experts and drops; the Images tab a heat map, modality x expert, of each layer.
    """

    def __init__(self, folder: Path, info: RunInfo) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self._names = info.routing
        self._picture_due = 0.0
        purge = info.start_step + 1 if info.start_step else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge, flush_secs=20)
        if self._names is not None:
            self._writer.add_custom_scalars({"routing": _charts(self._names)})

    def metrics(self, metrics: Metrics) -> None:
        """Losses, accuracies, speed and routing of one report; heat maps when they are due, and with the last one."""
        scalars = scalars_of(metrics, self._names)
        self._add(scalars, metrics.step)
        now = time.perf_counter()
        if metrics.routing is not None and (now >= self._picture_due or metrics.step == metrics.total_steps):
            self._draw(metrics.routing, metrics.step)
            self._picture_due = time.perf_counter() + (time.perf_counter() - now) / PICTURE_SHARE

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """The metric of each task on a split."""
        self._add(scalars_of_scores(split, scores), step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()

    def _add(self, scalars: Mapping[str, float], step: int) -> None:
        """All scalars as one event: a tenth of the time that an event each takes."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in scalars.items()]
        self._writer.file_writer.add_summary(Summary(value=values), step)

    def _draw(self, routing: RouterReport, step: int) -> None:
        names = self._names
        assert names is not None
        rows = np.flatnonzero(routing.tokens_M > 0)
        for number, layer in enumerate(names.layers):
            share_ME = np.where(names.allowed_LME[number], routing.share_LME[number], np.nan)[rows]
            picture = draw_heatmap(
                share_ME,
                rows=[names.rows[row] for row in rows],
                columns=names.experts,
                title=f"layer {layer}, step {step}: share of each modality's choices, %",
            )
            self._writer.add_image(f"routing/layer_{layer}", picture, step, dataformats="HWC")


def _charts(names: RoutingNames) -> dict[str, list[Any]]:
    """The layout of the Custom Scalars tab: chart -> its kind and the expressions that its tags match."""
    charts = {}
    for layer in names.layers:
        for title, tag in (("load of each expert", "load"), ("evenness of each modality", "evenness")):
            charts[f"{title}, layer {layer}"] = ["Multiline", [f"^{tag}/{re.escape(f'layer_{layer}/')}"]]
    charts["dead experts"] = ["Multiline", ["^dead_experts/"]]
    charts["dropped slots"] = ["Multiline", ["^dropped_slots/"]]
    return charts
