"""What decides the last bits of a run's numbers on this machine: two of one kind compute the same ones.

Loops over vectors are compiled several times, and each library takes the version for the processor that it finds. Sums
then have another order. So a kind is finer than an architecture: processor, what it can do, who compiled what.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from moemm.ops import backend_info

_LEVELS = {
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}
"""What Linux calls the features of a level (x86-64 psABI); moemm's loops exist once for each, and for any processor."""


_ENVIRONMENT = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA")


def machine_kind(cpuinfo: str | None = None) -> dict[str, str]:
    """What the processor is and can do, and versions and builds of all that computes; environment variables count.

    cpuinfo: contents of /proc/cpuinfo, of this machine when not given.
    """
    if cpuinfo is None:
        path = Path("/proc/cpuinfo")
        cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    build = backend_info()["build"]
    chosen = [f"{name}={os.environ[name]}" for name in _ENVIRONMENT if name in os.environ]
    return {
        "cpu": _processor(cpuinfo),
        "level": _level(cpuinfo),
        "torch": " ".join([torch.__version__, torch.backends.cpu.get_cpu_capability(), *chosen]),
        "ops": f"{build['compiler']} {build['flags']}" if build else "plain PyTorch",
        "libraries": f"deepspeed {version('deepspeed')}, numpy {version('numpy')}, {' '.join(platform.libc_ver())}",
    }


def differing(one: dict[str, str], other: dict[str, str]) -> str:
    """What two kinds differ in, in words; empty where they are the same."""
    keys = dict.fromkeys([*one, *other])
    return "; ".join(f"{key}: {one.get(key)}, not {other.get(key)}" for key in keys if one.get(key) != other.get(key))


def _processor(cpuinfo: str) -> str:
    fields = {key.strip(): value.strip() for key, _, value in _lines(cpuinfo)}
    known = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return " ".join([platform.machine(), fields.get("vendor_id", "unknown"), *known])


def _level(cpuinfo: str) -> str:
    flags = next((set(value.split()) for key, _, value in _lines(cpuinfo) if key.strip() == "flags"), set[str]())
    found, needed = "any", set[str]()
    for level, names in _LEVELS.items():
        needed |= names
        if needed <= flags:
            found = level
    return found


def _lines(cpuinfo: str) -> list[tuple[str, str, str]]:
    # The first processor's block: the others are like it.
    return [line.partition(":") for line in cpuinfo.strip().split("\n\n")[0].splitlines()]
