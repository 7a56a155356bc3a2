"""Loads the compiled ops, or says why they are not there. The only place that imports moemm._C."""

from __future__ import annotations

import importlib
import mmap
import re
import warnings
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from moemm.errors import KernelError

REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall . (with -e where it was installed so)"
_MARK = re.compile(rb"moemm-built-for-torch=([^;]+);")


@dataclass(frozen=True, slots=True)
class Backend:
    """What runs the ops: the library's build_info() and path, or why plain PyTorch stands in for it."""

    path: Path | None
    build: dict[str, Any] | None
    why: str


def find_library(folder: Path) -> Path | None:
    """The compiled module for this Python in `folder`, None if it was not built."""
    candidates = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def built_for(library: Path) -> str | None:
    """The torch version that a library names, read from the file without loading it; None if it names none."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        match = _MARK.search(content)
        return match.group(1).decode() if match else None


def check_fit(library: Path, *, torch_version: str) -> None:
    """Raises KernelError if the library was built against another torch: loading it might crash the process."""
    version = built_for(library)
    if version != torch_version:
        raise KernelError(
            f"{library} was built against torch {version or '(unknown)'}, but torch {torch_version} is installed, "
            f"and the two do not fit. Build it again, in the source folder: {REBUILD}"
        )


def load() -> Backend:
    """Loads moemm._C and so registers its ops. Without it: a warning, and the plain PyTorch implementations.

    Raises KernelError for a library that is there but cannot be used.
    """
    library = find_library(Path(__file__).parents[1])
    if library is None:
        why = "moemm._C is not built for this Python (or was left out by MOEMM_BUILD=none)"
        warnings.warn(
            f"{why}: ops run in plain PyTorch, which is slower. To build it, in the source folder: {REBUILD}",
            RuntimeWarning,
            stacklevel=3,
        )
        return Backend(None, None, why)
    check_fit(library, torch_version=str(torch.__version__))
    try:
        build = importlib.import_module("moemm._C").build_info()
    except ImportError as error:
        raise KernelError(
            f"{library} cannot be loaded: {error}. Build it again, in the source folder: {REBUILD}"
        ) from None
    return Backend(library, build, "moemm._C is built and fits the installed torch")


BACKEND = load()
COMPILED = BACKEND.build is not None


def refuse_second_derivative(op: str) -> None:
    """Makes the derivative of the op's backward pass an error: without a formula torch warns, and gives none."""

    def refuse(ctx: Any, *grads: Any) -> None:
        raise KernelError(
            f"{op} has no second derivative: its compiled backward pass cannot be differentiated. Call "
            f"moemm.ops.reference.{op}, the same in plain PyTorch, where one is needed (a gradient penalty, a Hessian)."
        )

    torch.library.register_autograd(f"moemm::{op}_backward", refuse)


def backend_info() -> dict[str, Any]:
    """Which implementation of the ops is live, and why not the other.

    Keys: `live` ("compiled" or "reference"), `why`; `cuda` (whether CUDA tensors run compiled ops too), `why_no_cuda`
    (None if they do); `path` of the library and `build` (its build_info()), both None without one.
    """
    build = BACKEND.build
    cuda = bool(build and build["cuda"])
    reason = f"built for the CPU: {build['why']}" if build else BACKEND.why
    return {
        "live": "compiled" if COMPILED else "reference",
        "why": BACKEND.why,
        "cuda": cuda,
        "why_no_cuda": None if cuda else reason,
        "path": None if BACKEND.path is None else str(BACKEND.path),
        "build": build,
    }
