"""An expert switched off, to see what depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from moemm.config.suggest import did_you_mean
from moemm.errors import ConfigError
from moemm.moe.layer import MoELayer

Undo = Callable[[], object]


@contextmanager
def without_expert(model: nn.Module, expert_id: str) -> Iterator[None]:
    """Inside, the expert adds nothing to the output of any layer that has it; all else stays as it is.

    Routers decide as before: the slots that went to a routed expert are lost, and no gate changes. A lora expert whose
    base is switched off goes on. On leaving, also by an error, everything is as it was; may be nested.
    Raises ConfigError for an id that no layer has.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    known = list(dict.fromkeys(expert.id for layer in layers for expert in layer.map.experts))
    if expert_id not in known:
        raise ConfigError(
            f"no expert is called {expert_id!r}{did_you_mean(expert_id, known)}\n"
            f"  experts of this model: {', '.join(known) or 'none'}"
        )
    with ExitStack() as stack:
        for layer in layers:
            for undo in _switch_off(layer, expert_id):
                stack.callback(undo)
        yield


def _switch_off(layer: MoELayer, expert_id: str) -> Iterator[Undo]:
    if expert_id in layer.shared:
        # Not taken out of the layer: its weights may be the base of a lora expert.
        yield layer.shared[expert_id].register_forward_hook(lambda module, given, out: torch.zeros_like(out)).remove
    elif expert_id in layer.experts:
        number = list(layer.experts).index(expert_id)
        for name in ("place_E", "hard_MK"):
            table = getattr(layer, name)
            yield lambda name=name, table=table: setattr(layer, name, table)  # type: ignore[misc]
            setattr(layer, name, table.masked_fill(table == number, -1))
