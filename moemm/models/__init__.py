"""The model: packed stream, trunk, heads, and how they are built from a config."""

from moemm.models.model import Model, ModelOutput, build_model
from moemm.models.views import Pretext, Sums, Views

__all__ = ["Model", "ModelOutput", "Pretext", "Sums", "Views", "build_model"]
