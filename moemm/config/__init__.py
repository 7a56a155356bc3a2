"""Typed, strict configuration: YAML and overrides in, a checked `Config` out. Imports no torch."""

from moemm.config.deepspeed import check_ranks, deepspeed_section, require_ranks
from moemm.config.dump import config_hash, save_config, show, to_dict, to_yaml
from moemm.config.load import LoadedConfig, from_dict, load_config
from moemm.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    DeepSpeedConfig,
    ExpertsConfig,
    ModalityConfig,
    ModelConfig,
    ObjectivesConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DeepSpeedConfig",
    "ExpertsConfig",
    "LoadedConfig",
    "ModalityConfig",
    "ModelConfig",
    "ObjectivesConfig",
    "TaskConfig",
    "TrainConfig",
    "check_ranks",
    "config_hash",
    "deepspeed_section",
    "from_dict",
    "load_config",
    "require_ranks",
    "save_config",
    "show",
    "to_dict",
    "to_yaml",
]
