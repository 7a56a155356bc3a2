"""The checks of `moemm doctor` that look at the machine and the installation; each returns its findings."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

from moemm.observe.finding import Finding

REQUIRED = ("torch", "deepspeed", "h5py", "numpy", "pydantic", "tyro", "rich", "tensorboard", "safetensors")
OPTIONAL = ("pybind11", "ninja", "scikit-learn")
OLD_LOCK_MINUTES = 10.0
MIN_SHARED_MIB = 64
PROBE_SECONDS = 90

_DEEPSPEED_PROBE = """
import json, deepspeed
from deepspeed.accelerator import get_accelerator
accelerator = get_accelerator()
print("\\n" + json.dumps({"version": deepspeed.__version__, "accelerator": accelerator.device_name(),
    "devices": accelerator.device_count(), "backend": accelerator.communication_backend_name()}))
"""


def versions() -> list[Finding]:
    """Python, moemm, and the packages that it needs."""
    found = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    data = {"python": platform.python_version(), "moemm": _version("moemm") or _source_version(), **found}
    text = ", ".join(f"{name} {version}" for name, version in data.items() if version)
    lacking = [name for name in REQUIRED if found[name] is None]
    if lacking:
        advice = f"{shlex.quote(sys.executable)} -m pip install {' '.join(lacking)}"
        return [Finding(name="versions", status="problem", text=f"missing: {', '.join(lacking)}", advice=advice)]
    return [Finding(name="versions", status="ok", text=text, data=data)]


def ops() -> list[Finding]:
    """Which implementation of moemm's ops runs, and why not the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moemm.ops import backend_info

    info = backend_info()
    live, why = info["live"], info["why"]
    if live != "compiled":
        advice = "build it: `make setup`, or `pip install --no-build-isolation .` in the source folder"
        return [Finding(name="ops", status="note", text=f"plain PyTorch is live: {why}", advice=advice, data=info)]
    cuda = "and CUDA" if info["cuda"] else f"only ({info['why_no_cuda']})"
    return [Finding(name="ops", status="ok", text=f"compiled ops are live, CPU {cuda}; {why}", data=info)]


def deepspeed_engine() -> list[Finding]:
    """DeepSpeed's version and accelerator, asked in a process of its own: its import may hang or crash."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "DS_LOG_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEEPSPEED_PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"importing it takes more than {PROBE_SECONDS} s"
        advice = "look for a build lock below, or set DS_BUILD_OPS=0"
        return [Finding(name="deepspeed", status="problem", text=text, advice=advice)]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding(name="deepspeed", status="problem", text=f"cannot be imported: {last}")]
    data = json.loads(done.stdout.strip().splitlines()[-1])
    text = "{version}, accelerator {accelerator} ({devices} devices), communication over {backend}".format(**data)
    return [Finding(name="deepspeed", status="ok", text=text, data=data)]


def compilers() -> list[Finding]:
    """C++ compiler, CUDA compiler and ninja: needed to build moemm._C, not to run it."""
    cxx = os.environ.get("CXX", "c++")
    found = {"c++": _tool_version(cxx), "nvcc": _tool_version("nvcc"), "ninja": _tool_version("ninja")}
    text = "; ".join(f"{name}: {version or 'none'}" for name, version in found.items())
    if found["c++"] is None:
        advice = "install g++ or clang++ to build the compiled ops (or set CXX to where it is)"
        return [Finding(name="compilers", status="note", text=text, advice=advice, data=dict(found))]
    return [Finding(name="compilers", status="ok", text=text, data=dict(found))]


def gpus() -> list[Finding]:
    """The GPUs that torch sees; a problem where the machine has one that torch cannot use."""
    import torch

    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        data = [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in every]
        text = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in data)
        return [Finding(name="gpus", status="ok", text=text, data={"gpus": data})]
    seen = _first_line(["nvidia-smi", "-L"])
    if seen is None or not seen.startswith("GPU"):
        return [Finding(name="gpus", status="note", text="none; training runs on the CPU", data={"gpus": []})]
    why = "is a build for the CPU" if torch.version.cuda is None else "cannot start CUDA (driver too old?)"
    advice = "install the CUDA build of torch, then build moemm again"
    text = f"the machine has {seen.split(' (UUID')[0]}, but torch {torch.__version__} {why}"
    return [Finding(name="gpus", status="problem", text=text, advice=advice)]


def megablocks() -> list[Finding]:
    """The optional backend: absent, complete, or installed without its compiled ops (pip does that in silence)."""
    if importlib.util.find_spec("megablocks") is None:
        return [Finding(name="megablocks", status="note", text="not installed (optional)", data={"installed": False})]
    complete = all(importlib.util.find_spec(name) is not None for name in ("megablocks_ops", "grouped_gemm"))
    data = {"installed": True, "version": _version("megablocks"), "ops": complete}
    if complete:
        return [Finding(name="megablocks", status="ok", text=f"{data['version']}, with its ops", data=data)]
    advice = "build it where nvcc is: pip install --no-build-isolation --no-deps megablocks stanford-stk grouped_gemm"
    text = f"{data['version']} is installed, but without its ops: it cannot be used"
    return [Finding(name="megablocks", status="note", text=text, advice=advice, data=data)]


def build_locks(folder: Path | None = None) -> list[Finding]:
    """Locks in torch's extensions folder: one that a killed build left makes every later start wait for ever."""
    folder = folder or _extensions_folder()
    locks = sorted(folder.glob("**/lock")) if folder.is_dir() else []
    if not locks:
        return [Finding(name="build locks", status="ok", text=f"none in {folder}", data={"locks": []})]
    return [_lock_finding(lock) for lock in locks]


def shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Size of /dev/shm, through which worker processes and ranks hand over tensors."""
    if not folder.is_dir():
        return [Finding(name="shared memory", status="note", text=f"{folder} does not exist")]
    usage = shutil.disk_usage(folder)
    total, free = usage.total // 2**20, usage.free // 2**20
    data = {"total_mib": total, "free_mib": free}
    text = f"{folder}: {free} MiB free of {total} MiB"
    if free >= MIN_SHARED_MIB:
        return [Finding(name="shared memory", status="ok", text=text, data=data)]
    advice = "give the container more (docker run --shm-size=1g), or set data.num_workers to 0"
    return [Finding(name="shared memory", status="problem", text=text, advice=advice, data=data)]


def _lock_finding(lock: Path) -> Finding:
    minutes = (time.time() - lock.stat().st_mtime) / 60
    data = {"path": str(lock), "minutes": round(minutes, 1)}
    if minutes < OLD_LOCK_MINUTES:
        return Finding(name="build locks", status="note", text=f"{lock} is new: a build seems to be running", data=data)
    text = f"{lock} is {minutes:.0f} minutes old: if no build is running, every start waits for it for ever"
    return Finding(name="build locks", status="problem", text=text, advice=f"rm {shlex.quote(str(lock))}", data=data)


def _extensions_folder() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _source_version() -> str:
    import moemm

    return moemm.__version__


def _tool_version(command: str) -> str | None:
    """First line with a version in it that `command --version` prints; None if there is no such command."""
    path = shutil.which(command)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if re.search(r"\d+\.\d+", line)]
    return lines[0] if lines else path


def _first_line(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return next(iter(done.stdout.strip().splitlines()), None) if done.returncode == 0 else None
