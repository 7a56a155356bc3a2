"""Losses in bits, comparable within a task. n samples, C outputs."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from moemm.data.catalogue import TaskInfo


def bits(task: TaskInfo, output_nC: torch.Tensor, target: torch.Tensor) -> float:
    """Mean bits a sample that the outputs leave open.

    Classification: cross entropy. Multilabel: that of a column, averaged over columns. Regression: half the log2 of the
    mean squared error, averaged over columns; it is the entropy of a Gaussian but for a constant, so that only
    differences mean something.
    """
    if task.target == "classification":
        return float(F.cross_entropy(output_nC, target)) / math.log(2)
    if task.target == "multilabel":
        return float(F.binary_cross_entropy_with_logits(output_nC, target.float())) / math.log(2)
    error_C = (output_nC - target.float().view_as(output_nC)).square().mean(0).clamp_min(1e-12)
    return float(error_C.log2().mean()) / 2


def null_outputs(task: TaskInfo, target: torch.Tensor) -> torch.Tensor:
    """(C,) outputs of the best head on features that are all zero, for the targets of the train split: its bias.

    One sample more of each class, so that a class that a small draw of samples lacks is not impossible.
    """
    if task.target == "classification":
        return (torch.bincount(target, minlength=task.outputs) + 1.0).log()
    if task.target == "multilabel":
        positive_C, number = target.float().sum(0), target.shape[0]
        return ((positive_C + 1) / (number - positive_C + 1)).log()
    return target.float().reshape(target.shape[0], task.outputs).mean(0)
