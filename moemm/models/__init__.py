"""The model: packed stream, trunk, heads, and how they are built from a config."""

from moemm.models.model import Model, ModelOutput, build_model

__all__ = ["Model", "ModelOutput", "build_model"]
