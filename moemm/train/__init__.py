"""Training: the trainer over the DeepSpeed engine, and runs loaded again."""

from moemm.train.api import Run, load_outline, load_run, train

__all__ = ["Run", "load_outline", "load_run", "train"]
