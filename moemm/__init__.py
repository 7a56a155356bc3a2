"""moemm trains one sparse mixture-of-experts model over any number of modalities.

    >>> import moemm
    >>> loaded = moemm.load_config("configs/recipes/quickstart.yaml", ["train.steps=100"])
    >>> summary = moemm.train_run(loaded)

Importing this package loads neither torch nor DeepSpeed; each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moemm.config import load_config as load_config
    from moemm.data import DataFile as DataFile
    from moemm.data import validate_file as validate_file
    from moemm.data import write_file as write_file
    from moemm.errors import MoemmError as MoemmError
    from moemm.evaluate import evaluate_run as evaluate_run
    from moemm.growth import extend as extend
    from moemm.growth import merge as merge
    from moemm.growth import upcycle as upcycle
    from moemm.harmonize import register_harmonizer as register_harmonizer
    from moemm.modalities import register_modality as register_modality
    from moemm.models import build_model as build_model
    from moemm.moe import register_router as register_router
    from moemm.objectives import register_objective as register_objective
    from moemm.observe.status import run_status as run_status
    from moemm.ops import backend_info as backend_info
    from moemm.plugins import load_plugin as load_plugin
    from moemm.train import export_run as export_run
    from moemm.train import load as load
    from moemm.train import load_run as load_run
    from moemm.train import train as train_run  # noqa: F401

__version__ = "0.1.0"

_PUBLIC = {
    "DataFile": ("moemm.data", "DataFile"),
    "MoemmError": ("moemm.errors", "MoemmError"),
    "backend_info": ("moemm.ops", "backend_info"),
    "build_model": ("moemm.models", "build_model"),
    "evaluate_run": ("moemm.evaluate", "evaluate_run"),
    "export_run": ("moemm.train", "export_run"),
    "extend": ("moemm.growth", "extend"),
    "load": ("moemm.train", "load"),
    "load_config": ("moemm.config", "load_config"),
    "load_plugin": ("moemm.plugins", "load_plugin"),
    "load_run": ("moemm.train", "load_run"),
    "merge": ("moemm.growth", "merge"),
    "register_harmonizer": ("moemm.harmonize", "register_harmonizer"),
    "register_modality": ("moemm.modalities", "register_modality"),
    "register_objective": ("moemm.objectives", "register_objective"),
    "register_router": ("moemm.moe", "register_router"),
    "run_status": ("moemm.observe.status", "run_status"),
    "train_run": ("moemm.train", "train"),  # not "train": that is the subpackage
    "upcycle": ("moemm.growth", "upcycle"),
    "validate_file": ("moemm.data", "validate_file"),
    "write_file": ("moemm.data", "write_file"),
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """The public name, imported at its first use (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moemm' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}")
    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
