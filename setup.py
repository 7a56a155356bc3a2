"""Builds the compiled ops, `moemm._C`; everything else about the package stands in pyproject.toml.

Environment variables:
    MOEMM_BUILD           auto (default) | cpu | cuda | none. auto takes cuda where nvcc and a CUDA build of torch are
                          there, else cpu. none builds nothing: ops then run in plain PyTorch, with a warning.
    DEBUG=1               -O0 -g, and the ops check that a plan's order and inverse agree.
    MOEMM_SANITIZE=1      -O1 -g with AddressSanitizer and UndefinedBehaviorSanitizer, for benchmarks/soak.py: whoever
                          loads the result must preload their libraries. CPU only, GCC or Clang.
    MAX_JOBS              files compiled at the same time.
    TORCH_CUDA_ARCH_LIST  GPU architectures, "8.0;9.0+PTX" where it is not set.
    CXX                   the C++ compiler.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")
BACKENDS = ("auto", "cpu", "cuda", "none")
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
# Findings are reported and counted, and the run goes on to the next. vptr needs the type information of classes that
# torch does not export; Python's own -fwrapv would define the overflow that is looked for.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fsanitize-recover=address,undefined", "-fno-wrapv"]


class Choice(NamedTuple):
    """What is built, and the reason in a few words."""

    backend: str
    why: str


def stop(message: str) -> SystemExit:
    """An error that ends the build without a traceback."""
    return SystemExit(f"moemm: error: {message}")


def torch_version() -> str:
    """Version of the torch to build against; an error where there is none."""
    try:
        import torch
    except ImportError:
        raise stop(
            "moemm._C is built against torch, and torch cannot be imported. Install it first (pip install torch), then "
            "run pip install --no-build-isolation again."
        ) from None
    return str(torch.__version__)


def torch_cuda() -> str | None:
    """CUDA version that torch was built for; None for a build without CUDA."""
    import torch

    return torch.version.cuda


def nvcc_version() -> str | None:
    """Version of the CUDA compiler, None where there is none. Sets CUDA_HOME, where it is not, to its toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return None
    if not home:  # nvcc itself knows: the one on PATH may be a wrapper or a link
        steps = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
        folder = re.search(r"_HERE_=(.+)", steps)
        os.environ["CUDA_HOME"] = str(Path(folder.group(1)).parent if folder else Path(nvcc).parents[1])
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else None


def cuda_obstacle(nvcc: str | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA ops cannot be built; None if they can."""
    if torch_cuda is None:
        return "the installed torch has no CUDA"
    if nvcc is None:
        return "there is no nvcc on PATH or in CUDA_HOME"
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is {nvcc}, but torch was built for CUDA {torch_cuda}"
    return None


def choose(environment: Mapping[str, str], obstacle: Callable[[], str | None]) -> Choice:
    """What to build by MOEMM_BUILD; `obstacle` says why CUDA is impossible, None if it is possible."""
    wish = environment.get("MOEMM_BUILD", "auto")
    if wish not in BACKENDS:
        raise stop(f"MOEMM_BUILD is {wish!r}; allowed are {', '.join(BACKENDS)}.")
    if wish in ("none", "cpu"):
        return Choice(wish, f"MOEMM_BUILD={wish}")
    if set_in(environment, "MOEMM_SANITIZE"):
        if wish == "cuda":
            raise stop("MOEMM_SANITIZE is set with MOEMM_BUILD=cuda: compute-sanitizer checks kernels; unset one.")
        return Choice("cpu", "MOEMM_SANITIZE is set")
    problem = obstacle()
    if wish == "cuda" and problem:
        raise stop(f"MOEMM_BUILD=cuda, but {problem}. Mend that, or use MOEMM_BUILD=cpu.")
    if wish == "cuda":
        return Choice("cuda", "MOEMM_BUILD=cuda")
    return Choice("cpu", problem) if problem else Choice("cuda", "nvcc and torch agree on CUDA")


def check_compiler(environment: Mapping[str, str]) -> str:
    """The C++ compiler's command. Where it or Python's headers are missing: an error that names what to install."""
    compiler = environment.get("CXX", "c++")
    if shutil.which(compiler.split()[0], path=environment.get("PATH")) is None:
        raise stop(
            f"there is no C++ compiler: {compiler!r} is not on PATH. Install one (Debian, Ubuntu: apt install g++; "
            "Fedora: dnf install gcc-c++; conda: conda install cxx-compiler) or set CXX. MOEMM_BUILD=none does "
            "without: moemm then runs its ops in plain PyTorch, which is slower."
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise stop(f"Python.h is not in {headers}. Install Python's headers (Debian, Ubuntu: apt install python3-dev).")
    return compiler


def gaps_of_the_toolkit(home: Path, packages: Path, links: Path) -> tuple[list[str], list[str]]:
    """Flags and folders for what a toolkit that is little more than nvcc lacks and pip's nvidia packages have.

    home: the toolkit; packages: site-packages/nvidia; links: a folder that may be written to. Headers are looked up
    there last. pip's packages name the runtime library by its version alone, so that the linker needs a link.
    """
    flags = [f"-idirafter{folder}" for folder in sorted(packages.glob("cu*/include"))]
    folders = [folder for name in ("lib64", "lib") for folder in (home / name, *sorted(packages.glob(f"cu*/{name}")))]
    if any((folder / "libcudart.so").exists() for folder in folders):
        return flags, [str(folder) for folder in folders if (folder / "libcudart.so").exists()]
    found = next((path for folder in folders for path in sorted(folder.glob("libcudart.so.*"))), None)
    if found is None:
        return flags, []
    links.mkdir(parents=True, exist_ok=True)
    link = links / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(found)
    return flags, [str(links)]


def set_in(environment: Mapping[str, str], name: str) -> bool:
    """Whether a switch is on: set, and not to 0."""
    return environment.get(name, "0") not in ("", "0")


def generated(sanitize: bool) -> Path:
    """Where build_config.h goes: a sanitized build must not make the usual one stale."""
    return Path("build/sanitized/generated" if sanitize else "build/generated")


def compiler_flags(debug: bool, sanitize: bool = False) -> list[str]:
    """Flags for C++: portable code, so that one build runs on every machine; csrc/cpu/simd.h adds vector code.

    -fno-math-errno and -fno-trapping-math let loops over rounding and selection be vectorised; they change no value.
    """
    optimise = ["-O0", "-g", "-UNDEBUG", "-DMOEMM_DEBUG"] if debug else ["-O3", "-g0"]
    optimise = ["-O1", "-g", "-fno-omit-frame-pointer", *SANITIZE] if sanitize else optimise
    optimise += ["-fno-math-errno", "-fno-trapping-math"]
    return [*optimise, "-Wall", "-fvisibility=hidden"] + (["-fopenmp"] if sys.platform == "linux" else [])


def write_build_config(choice: Choice, compiler: str, flags: list[str], folder: Path) -> None:
    """moemm/build_config.h in the folder of generated files: what build_info() answers."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    values = {
        "VERSION": version,
        "TORCH_VERSION": torch_version(),
        "COMPILER": Path(compiler.split()[0]).name,
        "FLAGS": " ".join(flags),
        "CUDA_ARCHS": os.environ["TORCH_CUDA_ARCH_LIST"] if choice.backend == "cuda" else "",
        "WHY": choice.why,
    }
    quoted = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in values.items()}
    text = "#pragma once\n" + "".join(f'#define MOEMM_{name} "{value}"\n' for name, value in quoted.items())
    path = ROOT / folder / "moemm" / "build_config.h"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def extension(choice: Choice, compiler: str) -> Any:
    """The extension module moemm._C."""
    import pybind11
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    debug, sanitize = set_in(os.environ, "DEBUG"), set_in(os.environ, "MOEMM_SANITIZE")
    flags = compiler_flags(debug, sanitize)
    write_build_config(choice, compiler, flags, generated(sanitize))
    cuda = choice.backend == "cuda"
    folders = [CSRC, CSRC / "cpu"] + ([CSRC / "cuda"] if cuda else [])
    suffixes = ("*.cpp", "*.cu") if cuda else ("*.cpp",)
    nvcc = ["-O0", "-g", "-G"] if debug else ["-O3", "-lineinfo"]
    more: list[str] = []
    libraries: list[str] = []
    if cuda:
        packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
        more, libraries = gaps_of_the_toolkit(Path(os.environ["CUDA_HOME"]), packages, ROOT / "build" / "cuda-links")
    return (CUDAExtension if cuda else CppExtension)(
        "moemm._C",
        sources=sorted(str(path) for folder in folders for suffix in suffixes for path in folder.glob(suffix)),
        depends=["setup.py", *(str(path) for suffix in ("h", "cuh") for path in CSRC.rglob(f"*.{suffix}"))],
        include_dirs=[str(ROOT / CSRC / "include"), str(ROOT / generated(sanitize)), pybind11.get_include()],
        define_macros=[("MOEMM_WITH_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": [*flags, *more], "nvcc": nvcc},
        library_dirs=libraries,
        # Not linked to an OpenMP library: the one that torch brings is used, and there is one pool of threads.
        extra_link_args=SANITIZE if sanitize else [] if debug else ["-s"],
    )


def build_arguments() -> dict[str, Any]:
    """What setup() needs to know of the extension."""
    os.chdir(ROOT)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # its ninja
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS)

    def obstacle() -> str | None:
        torch_version()
        return cuda_obstacle(nvcc_version(), torch_cuda())

    choice = choose(os.environ, obstacle)
    if choice.backend == "none":
        for stale in (ROOT / "moemm").glob("_C.*.so"):
            stale.unlink()
        print("moemm: not building moemm._C (MOEMM_BUILD=none): its ops will run in plain PyTorch", flush=True)
        return {}
    compiler = check_compiler(os.environ)
    torch_version()
    print(f"moemm: building moemm._C for {choice.backend} ({choice.why})", flush=True)
    from torch.utils.cpp_extension import BuildExtension

    return {"ext_modules": [extension(choice, compiler)], "cmdclass": {"build_ext": BuildExtension}}


if __name__ == "__main__":
    setup(**(build_arguments() if BUILDING & set(sys.argv) else {}))
