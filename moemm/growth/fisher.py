"""How much the outputs of a model depend on each of its parameters: the diagonal of the Fisher information."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from moemm.data.catalogue import TaskInfo
from moemm.data.sample import PackedBatch
from moemm.models import Model
from moemm.objectives import supervised_losses


def diagonal_fisher(model: Model, batches: Iterable[PackedBatch], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Parameter -> mean over samples of the squared gradient of the sample's loss, float64; learned parameters alone.

    batches: of one sample each. The labels are drawn from the model's own predictions, which makes it the Fisher
    information; with those of the data it would be small everywhere in a run that knows its samples by heart. All
    labels of a sample count as one observation. The model is in eval mode; its gradients stay as they are.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    squares = [torch.zeros(parameter.shape, dtype=torch.float64) for parameter in parameters]
    draw = torch.Generator().manual_seed(seed)
    number = 0
    model.eval()
    for batch in batches:
        number += batch.num_samples
        loss = _own_loss(model, batch, draw)
        for square, grad in zip(squares, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                square += grad.double().square()
    return {name: square / max(1, number) for name, square in zip(names, squares, strict=True)}


def _own_loss(model: Model, batch: PackedBatch, draw: torch.Generator) -> torch.Tensor:
    """The loss of the batch's samples, summed over their tasks, on labels that the model draws."""
    outputs = model(batch).outputs
    tasks: Sequence[TaskInfo] = [task for task in model.tasks if len(outputs[task.name])]
    targets = {task.name: _drawn(task, outputs[task.name].detach(), draw) for task in tasks}
    losses = supervised_losses(outputs, targets, tasks)
    return torch.stack(list(losses.values())).sum()


def _drawn(task: TaskInfo, output_nC: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Labels from the distribution of which the task's loss is minus the log-likelihood, but for a constant."""
    if task.target == "classification":
        return torch.multinomial(output_nC.softmax(-1), 1, generator=draw)[:, 0]
    if task.target == "multilabel":
        return torch.bernoulli(output_nC.sigmoid(), generator=draw)
    noise_nC = torch.randn(output_nC.shape, generator=draw)
    return output_nC + noise_nC * math.sqrt(output_nC.shape[1] / 2)
