"""`train.only`: which tensors of a model training may move; all others keep their bits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from moemm.config.suggest import listed
from moemm.errors import ConfigError

_NEAR = 3


def freeze(model: nn.Module, only: Sequence[str] | None) -> None:
    """Stop the gradients of the parameters that no pattern of `only` matches; None leaves all as they are.

    Raises ConfigError for a pattern that matches no tensor, and where no parameter is left to train.
    """
    if only is None:
        return
    names = list(model.state_dict())
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"train.only: no tensor of the model matches {pattern!r}\n"
                f"  near it: {', '.join(_nearest(pattern, names))}\n"
                "  allowed: names as in model.safetensors of a checkpoint; * stands for any characters"
            )
    for name, parameter in model.named_parameters():
        if not matches(name, only):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"train.only: {listed(only)} match no parameter that can be trained, so nothing would be learned\n"
            "  to do: name parameters; states such as router.bias_* and the base of a lora expert have no gradient"
        )


def matches(name: str, only: Iterable[str] | None) -> bool:
    """Whether training may move the tensor of this name."""
    return only is None or any(fnmatchcase(name, pattern) for pattern in only)


def count_trained(model: nn.Module) -> int:
    """Parameters that have a gradient; whole ones, also where ZeRO-3 has partitioned them."""
    return sum(int(getattr(one, "ds_numel", one.numel())) for one in model.parameters() if one.requires_grad)


class FrozenState:
    """The buffers in checkpoints that no pattern of `only` matches, as they are now: biases of routers, running losses.

    They have no gradient, but steps move them; `restore` puts them back.
    """

    def __init__(self, model: nn.Module, only: Sequence[str] | None) -> None:
        saved = set(model.state_dict()) if only is not None else set()
        held = {name: value for name, value in model.named_buffers() if name in saved and not matches(name, only)}
        self._model, self._values = model, {name: value.detach().clone() for name, value in held.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back; after each step."""
        if self._values:
            now: Mapping[str, torch.Tensor] = dict(self._model.named_buffers())
            for name, value in self._values.items():
                now[name].copy_(value)


def _nearest(pattern: str, names: Sequence[str]) -> list[str]:
    """Names, or beginnings of names, that look like the pattern."""
    parts = [name.split(".") for name in names]
    known = dict.fromkeys(".".join(one[:end]) for one in parts for end in range(len(one), 0, -1))
    plain = pattern.replace("*", "")
    return difflib.get_close_matches(plain, known, n=_NEAR, cutoff=0.0)
