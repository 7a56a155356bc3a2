"""The build says what it does: MOEMM_BUILD, missing tools, stale libraries, and life without the compiled ops."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moemm
from moemm.errors import KernelError
from moemm.ops import backend, backend_info

ROOT = Path(__file__).parents[2]
needs_library = pytest.mark.skipif(not backend.COMPILED, reason="moemm._C is not built")


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("moemm_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("wish", "obstacle", "backend_name", "why"),
    [
        (None, None, "cuda", "agree on CUDA"),
        (None, "there is no nvcc", "cpu", "there is no nvcc"),
        ("auto", None, "cuda", "agree on CUDA"),
        ("cpu", None, "cpu", "MOEMM_BUILD=cpu"),
        ("cuda", None, "cuda", "MOEMM_BUILD=cuda"),
        ("none", "there is no nvcc", "none", "MOEMM_BUILD=none"),
    ],
)
def test_choice(setup_py: ModuleType, wish: str | None, obstacle: str | None, backend_name: str, why: str) -> None:
    choice = setup_py.choose({} if wish is None else {"MOEMM_BUILD": wish}, lambda: obstacle)
    assert choice.backend == backend_name and why in choice.why


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ("cuda", "MOEMM_BUILD=cuda, but there is no nvcc"),
        ("gpu", "MOEMM_BUILD is 'gpu'; allowed are auto, cpu, cuda, none"),
        ("", "MOEMM_BUILD is ''"),
    ],
)
def test_choices_that_are_refused(setup_py: ModuleType, wish: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        setup_py.choose({"MOEMM_BUILD": wish}, lambda: "there is no nvcc")


@pytest.mark.parametrize(
    ("nvcc", "cuda", "text"),
    [
        ("13.0", None, "torch has no CUDA"),
        (None, "13.0", "no nvcc"),
        ("12.4", "13.0", "nvcc is 12.4, but torch was built for CUDA 13.0"),
        ("13.1", "13.0", None),
    ],
)
def test_what_keeps_cuda_from_being_built(
    setup_py: ModuleType, nvcc: str | None, cuda: str | None, text: str | None
) -> None:
    obstacle = setup_py.cuda_obstacle(nvcc, cuda)
    assert obstacle is None if text is None else text in obstacle


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_unknown_choice_ends_the_build() -> None:
    result = run_setup("build_ext", MOEMM_BUILD="gpu")
    assert result.returncode != 0 and "MOEMM_BUILD is 'gpu'" in result.stderr and "Traceback" not in result.stderr


def test_no_compiler_is_an_error_that_names_the_package_and_the_way_out() -> None:
    result = run_setup("build_ext", MOEMM_BUILD="cpu", CXX="no-such-compiler")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    for text in ("'no-such-compiler' is not on PATH", "apt install g++", "MOEMM_BUILD=none"):
        assert text in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA here")
def test_forced_cuda_without_cuda_is_an_error_before_anything_is_compiled() -> None:
    result = run_setup("build_ext", MOEMM_BUILD="cuda")
    assert result.returncode != 0 and "the installed torch has no CUDA" in result.stderr
    assert "g++" not in result.stdout and "Traceback" not in result.stderr


def test_sanitizers_take_the_cpu_and_a_folder_of_their_own(setup_py: ModuleType) -> None:
    assert setup_py.choose({"MOEMM_SANITIZE": "1"}, lambda: None) == ("cpu", "MOEMM_SANITIZE is set")
    assert setup_py.choose({"MOEMM_SANITIZE": "0"}, lambda: None).backend == "cuda"
    assert "-fsanitize=address,undefined" in setup_py.compiler_flags(False, sanitize=True)
    assert setup_py.generated(sanitize=True) != setup_py.generated(sanitize=False)
    with pytest.raises(SystemExit, match="MOEMM_SANITIZE is set with MOEMM_BUILD=cuda"):
        setup_py.choose({"MOEMM_SANITIZE": "1", "MOEMM_BUILD": "cuda"}, lambda: None)


def test_a_toolkit_of_little_more_than_nvcc_is_filled_up_from_pips_packages(
    setup_py: ModuleType, tmp_path: Path
) -> None:
    home, packages, links = tmp_path / "home", tmp_path / "nvidia", tmp_path / "links"
    (home / "bin").mkdir(parents=True)
    assert setup_py.gaps_of_the_toolkit(home, packages, links) == ([], [])
    for folder in ("include", "lib"):
        (packages / "cu13" / folder).mkdir(parents=True)
    library = packages / "cu13" / "lib" / "libcudart.so.13"
    library.touch()
    flags, folders = setup_py.gaps_of_the_toolkit(home, packages, links)
    assert flags == [f"-idirafter{packages}/cu13/include"] and folders == [str(links)]
    assert (links / "libcudart.so").resolve() == library
    (home / "lib64").mkdir()
    (home / "lib64" / "libcudart.so").touch()
    assert setup_py.gaps_of_the_toolkit(home, packages, links)[1] == [str(home / "lib64")]


def test_cuda_check_without_nvcc_says_that_nothing_was_compiled(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "cuda_check.py")]
    environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0 and "Traceback" not in done.stderr and not done.stdout
    assert f"there is no nvcc in {tmp_path}/bin (CUDA_HOME), so the CUDA sources were NOT compiled" in done.stderr


def test_debug_changes_the_flags(setup_py: ModuleType) -> None:
    assert {"-O0", "-g", "-DMOEMM_DEBUG"} <= set(setup_py.compiler_flags(debug=True))
    assert "-O3" in setup_py.compiler_flags(debug=False)


def copy_package(folder: Path) -> Path:
    """moemm without its compiled library."""
    shutil.copytree(ROOT / "moemm", folder / "moemm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def python_in(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


WITHOUT_LIBRARY = """
from moemm import ops
from moemm.testing.op_cases import op_cases
for number, case in enumerate(op_cases()):
    if number % 20 == 0:
        case.check()
info = ops.backend_info()
assert info["live"] == "reference" and "MOEMM_BUILD=none" in info["why"] and not info["cuda"], info
"""


def test_without_the_library_ops_run_in_plain_pytorch_after_one_warning(tmp_path: Path) -> None:
    result = python_in(copy_package(tmp_path), WITHOUT_LIBRARY)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("ops run in plain PyTorch") == 1


@needs_library
def test_a_library_for_another_torch_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    assert backend.BACKEND.path is not None
    library = copy_package(tmp_path) / "moemm" / backend.BACKEND.path.name
    mark = f"moemm-built-for-torch={torch.__version__};".encode()
    other = mark.replace(torch.__version__[:1].encode(), b"9", 1)
    content = backend.BACKEND.path.read_bytes()
    assert mark in content
    library.write_bytes(content.replace(mark, other))
    result = python_in(tmp_path, "import moemm.ops")
    assert result.returncode == 1
    assert f"but torch {torch.__version__} is installed" in result.stderr and "pip install" in result.stderr


def test_a_file_that_is_no_library_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "_C.so"
    path.write_bytes(b"something else")
    with pytest.raises(KernelError, match=r"built against torch \(unknown\)"):
        backend.check_fit(path, torch_version="2.13.0")


@needs_library
def test_build_info_is_complete() -> None:
    info = backend_info()
    assert info["live"] == "compiled" and info["build"]["torch"] == torch.__version__
    assert info["build"]["version"] == moemm.__version__
    assert info["cuda"] == info["build"]["cuda"] and (info["why_no_cuda"] is None) == info["cuda"]


@needs_library
def test_only_debug_builds_compare_order_with_inverse() -> None:
    order_R, inverse_TK = torch.tensor([1, 0]), torch.tensor([[0], [1]])
    if backend_info()["build"]["debug"]:
        with pytest.raises(RuntimeError, match="inverse sends slot 0 to row 0, but order takes that row from slot 1"):
            moemm.ops.permute(torch.zeros(2, 3), order_R, inverse_TK)
    else:
        moemm.ops.permute(torch.zeros(2, 3), order_R, inverse_TK)


def test_one_version_and_pins_for_all_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == moemm.__version__
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extra = project["optional-dependencies"]
    needed = [*project["dependencies"], *extra["dev"]]
    assert {re.split(r"[<>=!\[ ]", one)[0].lower() for one in needed} <= pinned


def test_public_names_exist_and_cost_nothing_until_used() -> None:
    assert all(getattr(moemm, name) is not None for name in moemm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        _ = moemm.tarin
    code = "import sys, moemm; assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    assert python_in(ROOT, code).returncode == 0


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


CUDA_SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))


def test_there_are_cuda_sources_to_compile_and_setup_py_takes_them_all() -> None:
    assert len(CUDA_SOURCES) >= 4 and {path.parent for path in CUDA_SOURCES} == {ROOT / "csrc" / "cuda"}


@pytest.mark.skipif(find_nvcc() is None, reason="NOT CHECKED, no nvcc: do the .cu files compile?")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_compile_for_each_architecture(source: Path, tmp_path: Path) -> None:
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    as_torch_does = ["-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "-D__CUDA_NO_HALF_CONVERSIONS__", "--expt-relaxed-constexpr"]
    command = [
        str(find_nvcc()),
        *as_torch_does,
        "-std=c++20",
        "-O1",
        "--threads=2",
        "-Xcompiler=-Wall",
        "-Werror=all-warnings",
        *architectures,
    ]
    command += ["-I", str(ROOT / "csrc" / "include"), "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stderr
