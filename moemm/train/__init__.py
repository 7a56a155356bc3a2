"""Training: the trainer over the DeepSpeed engine, and runs loaded again."""

from moemm.train.api import Run, load_outline, load_run, train
from moemm.train.exporting import export_run, load

__all__ = ["Run", "export_run", "load", "load_outline", "load_run", "train"]
