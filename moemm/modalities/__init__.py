"""Modalities: how each kind of signal becomes tokens. One file a kind, found by the registry."""

from moemm.modalities import audio, features, image, sensor, tabular, text, timeseries, video
from moemm.modalities.base import ModalitySpec, Tokenizer, Tokens
from moemm.modalities.fit import build_tokenizer, fit_modalities, prepare_functions, specs_from_dict, specs_to_dict
from moemm.modalities.registry import KINDS, register_modality
from moemm.modalities.targets import Targets, TargetShape

__all__ = [
    "KINDS",
    "ModalitySpec",
    "TargetShape",
    "Targets",
    "Tokenizer",
    "Tokens",
    "audio",
    "build_tokenizer",
    "features",
    "fit_modalities",
    "image",
    "prepare_functions",
    "register_modality",
    "sensor",
    "specs_from_dict",
    "specs_to_dict",
    "tabular",
    "text",
    "timeseries",
    "video",
]
