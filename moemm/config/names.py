"""The modalities that a configuration knows of before any file is opened."""

from __future__ import annotations

from moemm.config.schema import Config


def modality_names(config: Config) -> set[str]:
    """Names that the tasks' `modalities` lists hold, after renaming."""
    return {name for task in config.data.tasks for name in task.modalities or []}


def unknown_modalities(config: Config, names: set[str]) -> set[str]:
    """Those of `names` that no task has; none where a task takes whatever its file holds."""
    if any(task.modalities is None for task in config.data.tasks):
        return set()
    return names - modality_names(config)
