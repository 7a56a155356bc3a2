"""Which samples of a batch count for the supervised losses, where only a share of the labels is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moemm.config import Config
from moemm.config.check_objectives import is_on, label_free
from moemm.data.catalogue import Catalogue
from moemm.data.dataset import SplitDataset
from moemm.data.labels import labelled_items
from moemm.data.sample import PackedBatch, rows_of

Rows = Mapping[str, torch.Tensor]


class Labels:
    """Picks the labelled rows of each task's outputs and targets; all rows where all labels are used."""

    def __init__(self, catalogue: Catalogue, config: Config, device: torch.device) -> None:
        self._tasks, self._use = catalogue.tasks, is_on(config.objectives.supervised)
        self._known: list[torch.Tensor] | None = None
        unlabelled = bool(label_free(config.objectives)) or len(catalogue.groups) < len(catalogue.tasks)
        if config.data.label_share < 1.0 and unlabelled:  # else only samples with all their labels are drawn
            items = labelled_items(catalogue, share=config.data.label_share, seed=config.train.seed)
            self._known = []
            for task, chosen in zip(catalogue.tasks, items, strict=True):
                indices = SplitDataset(catalogue, task=task.name, split="train").indices
                known = torch.zeros(int(indices.max()) + 1, dtype=torch.bool)
                known[torch.from_numpy(indices[chosen])] = True
                self._known.append(known.to(device))

    def pick(self, outputs: Rows, batch: PackedBatch) -> tuple[Rows, Rows]:
        """Outputs and targets of the rows that count. With `objectives.supervised` off no row does."""
        if not self._use:
            return {k: v[:0] for k, v in outputs.items()}, {k: v[:0] for k, v in batch.targets.items()}
        if self._known is None:
            return outputs, batch.targets
        picked_outputs, picked_targets = {}, {}
        for number, (task, known) in enumerate(zip(self._tasks, self._known, strict=True)):
            counts_n = known[batch.index[rows_of(batch.task, self._tasks, number)]]
            picked_outputs[task.name] = outputs[task.name][counts_n]
            picked_targets[task.name] = batch.targets[task.name][counts_n]
        return picked_outputs, picked_targets
