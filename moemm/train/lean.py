"""A quick start. It keeps torch's compiler out of a process that compiles nothing: importing it takes longer than
DeepSpeed and the data together. Nothing is taken away: whoever compiles later in the process gets the compiler as ever.
ZeRO-3 and activation checkpointing import it all the same, in DeepSpeed's and torch's own code.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from moemm.observe.records import RunInfo
from moemm.train.callbacks.base import Callback

_MARKED: tuple[Callable[..., Any], ...] = (
    Optimizer.add_param_group,
    Optimizer.load_state_dict,
    Optimizer.state_dict,
    Optimizer.zero_grad,
)
"""What torch calls through a wrapper that imports the compiler, in order to say that it is not to be compiled."""


def without_compiler(optimizer: Optimizer) -> Optimizer:
    """`optimizer`, whose step does not import torch._dynamo; its hooks and what it computes stay."""
    whole = inspect.unwrap(type(optimizer).step)

    def step(self: Optimizer, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            return whole(self, *arguments, **named)

    hooked = Optimizer.profile_hook_step(step)
    optimizer.step = hooked.__get__(optimizer)  # type: ignore[method-assign]
    return optimizer


def mark_uncompiled() -> None:
    """Tell torch of the functions of _MARKED what its wrapper would find out by importing the compiler.

    A torch that keeps its note elsewhere starts slower, no more.
    """
    for function in _MARKED:
        inner = inspect.unwrap(function)
        if not hasattr(inner, "__dynamo_disable"):
            inner.__dynamo_disable = inner


def compile_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """As torch.compile used as a decorator, at the first call and not before."""
    if function is None:
        return lambda one: compile_when_called(one, **options)
    compiled: list[Callable[..., Any]] = []

    def call(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **options))
        return compiled[0](*arguments, **named)

    return call


class CollectFromHere(Callback):
    """Turns the garbage collector on before the first step, and leaves what was made until then out of its sight."""

    every_rank = True

    def on_start(self, info: RunInfo) -> None:
        """Set-up is over."""
        del info
        gc.freeze()
        gc.enable()
