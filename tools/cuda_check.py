"""Builds moemm._C for CUDA without a GPU: compile, link, import, and look which ops have a CUDA implementation.

    make cuda-check             # the same; some minutes and 6 GB of disk the first time
    python tools/cuda_check.py --keep

Needs nvcc, and a package index that has torch built for the same CUDA. Everything goes into .venv-cuda and build/cuda,
which are removed at the end unless --keep is given (logs stay); the usual build is left alone. Nothing is computed:
whether kernels give right results takes a GPU (benchmarks/gpu/run.sh).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV, BUILT = ROOT / ".venv-cuda", ROOT / "build" / "cuda"
ARCHITECTURES = "8.0;9.0"
TOOLS = ("setuptools", "wheel", "ninja", "pybind11", "numpy")
COMPOSED = {"grouped_mlp", "moe_ffn"}
"""Ops that moemm/ops makes of other ops on CUDA: their schemas are for the CPU alone. Tried below on fake tensors."""


def fail(message: str) -> SystemExit:
    """An error that ends the check without a traceback."""
    return SystemExit(f"cuda-check: error: {message}")


def find_nvcc() -> str:
    """The CUDA compiler of CUDA_HOME or PATH; an error that says what to do where there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        place = f"in {home}/bin (CUDA_HOME)" if home else "on PATH, and CUDA_HOME is not set"
        raise fail(
            f"there is no nvcc {place}, so the CUDA sources were NOT compiled. Install the CUDA toolkit (its compiler "
            "is enough, no driver or GPU is needed) and set CUDA_HOME to it."
        )
    return nvcc


def step(number: int, text: str) -> None:
    """Says what is done next."""
    print(f"[{number}/4] {text}", flush=True)


def run(command: list[str | Path], log: Path, **environment: str) -> None:
    """Runs a command in the checkout; its output goes to a file, whose end is shown where it fails."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line for line in lines if "error" in line.lower()][:20] + lines[-15:]
        raise fail(f"{' '.join(map(str, command))} ended with {done.returncode}; from {log}:\n" + "\n".join(shown))


def make_environment(torch: str, logs: Path) -> Path:
    """.venv-cuda with a CUDA build of torch; its Python."""
    python = VENV / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", VENV], logs / "venv.log")
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    run([*pip, torch, *TOOLS], logs / "pip.log")
    return python


def declared() -> set[str]:
    """Names of all ops in library.cpp."""
    return set(re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc" / "library.cpp").read_text(encoding="utf-8")))


def check_built() -> None:
    """In the new environment: import the library; every op has a CUDA implementation, or is composed of such ops."""
    import torch

    from moemm import ops

    info = ops.backend_info()
    if not info["cuda"]:
        raise fail(f"the library was built without CUDA: {info['why_no_cuda']}")
    print(f"      {info['path']}: torch {torch.__version__}, for {info['build']['cuda_archs']}")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    direct = {op for op in declared() if any(has(f"moemm::{op}", key) for key in keys)}
    composed = {op for op in declared() if op.removesuffix("_backward") in COMPOSED}
    missing = sorted(declared() - direct - composed)
    if missing or direct & composed:
        raise fail(f"no CUDA implementation of {missing}; both implemented and composed: {sorted(direct & composed)}")
    print(f"      {len(direct)} ops of {len(declared())} have CUDA kernels: {', '.join(sorted(direct))}")
    try_composed()
    print(f"      {len(composed)} are composed of these on CUDA (tried on fake tensors): {', '.join(sorted(composed))}")


def try_composed() -> None:
    """Runs grouped_mlp and moe_ffn on fake CUDA tensors: they must not reach an op that the GPU lacks."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moemm import ops

    with FakeTensorMode():
        x_TD = torch.empty(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        w1 = [torch.empty(64, 32, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        w2 = [torch.empty(32, 64, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        gates_TK = torch.empty(64, 2, device="cuda")
        experts_TK = torch.empty(64, 2, dtype=torch.int64, device="cuda")
        out_TD = ops.moe_ffn(x_TD, gates_TK, experts_TK, w1, w2, activation="gelu")
        if out_TD.shape != x_TD.shape or out_TD.device.type != "cuda" or not out_TD.requires_grad:
            raise fail(f"moe_ffn on fake CUDA tensors gave {tuple(out_TD.shape)} on {out_TD.device}")


def main() -> None:
    """Environment, build, check, clean-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch==2.14.1", help="what pip installs; its CUDA must be nvcc's")
    parser.add_argument("--keep", action="store_true", help="leave .venv-cuda and build/cuda in place")
    parser.add_argument("--built", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.built:
        check_built()
        return
    nvcc, began = find_nvcc(), time.monotonic()
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\S+),", release)
    BUILT.mkdir(parents=True, exist_ok=True)
    step(1, f"nvcc {version.group(1) if version else '(unknown)'} at {nvcc}")
    try:
        step(2, f"installing {options.torch} into {VENV.name} (some 6 GB) ...")
        python = make_environment(options.torch, BUILT)
        step(3, f"compiling {len(list((ROOT / 'csrc').rglob('*.cu')))} .cu files for {ARCHITECTURES}, and linking ...")
        folders: list[str | Path] = ["--build-lib", BUILT / "lib", "--build-temp", BUILT / "temp"]
        build = {"MOEMM_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
        run([python, "setup.py", "build", *folders], BUILT / "build.log", **build)
        step(4, "importing, and looking for the ops ...")
        run([python, "-P", Path(__file__), "--built"], BUILT / "check.log", PYTHONPATH=str(BUILT / "lib"))
        print((BUILT / "check.log").read_text(encoding="utf-8"), end="")
    finally:
        if not options.keep:
            shutil.rmtree(VENV, ignore_errors=True)
            shutil.rmtree(BUILT / "lib", ignore_errors=True)
            shutil.rmtree(BUILT / "temp", ignore_errors=True)
    print(f"cuda-check: passed in {time.monotonic() - began:.0f} s; nothing was run on a GPU")


if __name__ == "__main__":
    main()
