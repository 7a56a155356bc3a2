"""Objectives: what is minimised."""

from moemm.objectives import contrastive, masked, replaced, similarity
from moemm.objectives.pretext import LabelFree, build_pretext
from moemm.objectives.registry import OBJECTIVES, Objective, register_objective
from moemm.objectives.supervised import supervised_losses

__all__ = [
    "OBJECTIVES",
    "LabelFree",
    "Objective",
    "build_pretext",
    "contrastive",
    "masked",
    "register_objective",
    "replaced",
    "similarity",
    "supervised_losses",
]
