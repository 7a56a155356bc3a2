"""TensorBoard: losses, accuracies, scores, and the load of each expert per layer and modality."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moemm.observe.records import Metrics, RunInfo


class TensorBoard:
    """Writes event files into `folder`. `info.start_step`: events of later steps from before a resume are hidden."""

    def __init__(self, folder: Path, info: RunInfo) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        logging.getLogger("tensorboard").setLevel(logging.ERROR)
        from torch.utils.tensorboard import SummaryWriter

        self._modalities = info.modalities
        purge = info.start_step + 1 if info.start_step else None
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge, flush_secs=20)

    def metrics(self, metrics: Metrics) -> None:
        """Losses, accuracies, speed, and expert loads of one report."""
        scalars = {
            "train/loss": metrics.loss,
            "train/router_loss": metrics.router_loss,
            "train/lr": metrics.lr,
            "speed/tokens_per_second": metrics.tokens_per_second,
            **{f"loss/{task}": value for task, value in metrics.losses.items()},
            **{f"objective/{name}": value for name, value in metrics.objectives.items()},
            **{f"accuracy/{task}": value for task, value in metrics.accuracy.items()},
            **self._loads(metrics),
        }
        if metrics.grad_norm is not None:
            scalars["train/grad_norm"] = metrics.grad_norm
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, metrics.step)

    def _loads(self, metrics: Metrics) -> dict[str, float]:
        load_LME = metrics.load_LME
        if load_LME is None:
            return {}
        return {
            f"load/layer_{layer}/{modality}/expert_{expert}": float(load_LME[layer, m, expert])
            for layer in range(load_LME.shape[0])
            for m, modality in enumerate(self._modalities)
            for expert in range(load_LME.shape[2])
            if load_LME[layer, m].any()
        }

    def scores(self, step: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """The metric of each task on a split."""
        for task, score in scores.items():
            if score["value"] is not None:
                self._writer.add_scalar(f"{split}_{score['metric']}/{task}", score["value"], step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._writer.close()
