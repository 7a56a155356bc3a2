"""The sections of a run's report, each from plain values; what they are collected from is in report.py."""

from moemm.observe.sections.conflict import conflict_section
from moemm.observe.sections.evaluation import Measured, Subsets, cost_section, missing_section, reuse_section
from moemm.observe.sections.experts import map_section
from moemm.observe.sections.noise import noise_section
from moemm.observe.sections.pull import pull_section
from moemm.observe.sections.routing import heatmap_section, time_section
from moemm.observe.sections.scores import about, curves_section, scores_section

__all__ = [
    "Measured",
    "Subsets",
    "about",
    "conflict_section",
    "cost_section",
    "curves_section",
    "heatmap_section",
    "map_section",
    "missing_section",
    "noise_section",
    "pull_section",
    "reuse_section",
    "scores_section",
    "time_section",
]
