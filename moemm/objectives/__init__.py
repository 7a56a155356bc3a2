"""Objectives: what is minimised."""

from moemm.objectives.supervised import supervised_losses

__all__ = ["supervised_losses"]
