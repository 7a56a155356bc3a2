"""The shape of the code: who imports whom, and how long files and functions are."""

from __future__ import annotations

import ast
import functools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "moemm").rglob("*.py"))

# Each room of moemm/ and the rooms that it may import; errors, exact and points are open to all.
ALLOWED = {
    "errors": "",
    "exact": "",
    "points": "",
    "config": "",
    "ops": "config",
    "distributed": "config",
    "launch": "config",
    "checkpoint": "config distributed",
    "data": "config",
    "moe": "config ops",
    "harmonize": "config ops",
    "modalities": "config ops data",
    "models": "config ops data moe modalities harmonize",
    "objectives": "config ops data moe modalities harmonize models distributed",
    "evaluate": "config ops data moe modalities models objectives",
    "observe": "config ops data moe modalities models objectives evaluate distributed checkpoint",
    "analyze": "config ops data moe modalities harmonize models objectives evaluate checkpoint",
    "plan": "config data",
    "plugins": "config harmonize modalities moe objectives",
    "train": "config ops data moe modalities harmonize models objectives plugins evaluate observe distributed "
    "checkpoint",
    "growth": "config ops data moe modalities harmonize models objectives plugins evaluate observe distributed "
    "checkpoint analyze train",
}
# The command line and the public names may import everything but the test helpers, and testing everything.
EVERYTHING = {"cli", "__init__", "__main__", "testing"}
# Heavy or dangerous packages, and the only files that may import them.
OWNERS = {
    "h5py": {"moemm/data/hdf5.py"},
    "deepspeed": {"moemm/train/engine.py", "moemm/checkpoint/store.py"},
    "matplotlib": {"moemm/observe/plots.py"},
    "PIL": {"moemm/observe/heatmap.py"},
    "megablocks": {"moemm/moe/megablocks.py"},
    "moemm._C": {"moemm/ops/backend.py"},
}
TORCH_FREE = ("config", "errors", "launch", "plan", "points", "__init__")
# They work on records, with numpy.
NUMBERS = {"moemm/plan/trace.py", "moemm/plan/placement.py", "moemm/plan/simulate.py"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "moemm").parts[0].removesuffix(".py")


def imports(node: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Full names of what is imported anywhere below `node`."""
    for one in ast.walk(node):
        if isinstance(one, ast.Import):
            yield from ((alias.name, one) for alias in one.names)
        elif isinstance(one, ast.ImportFrom):
            assert one.level == 0, "imports are absolute"
            yield one.module or "", one
            yield from ((f"{one.module}.{alias.name}", one) for alias in one.names)


def top_level_imports(path: Path) -> Iterator[str]:
    """What importing the file imports: not what stands in functions or under TYPE_CHECKING."""
    pending = list(tree(path).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (name for name, _ in imports(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_what_its_room_may(path: Path) -> None:
    room = room_of(path)
    used = {name.split(".")[1] for name, _ in imports(tree(path)) if name.startswith("moemm.")}
    if room not in EVERYTHING:
        assert room in ALLOWED, f"moemm/{room} is new: say in ALLOWED what it may import"
        rooms = {entry.name.removesuffix(".py") for entry in (ROOT / "moemm").iterdir()}
        assert used & rooms <= {room, "errors", "exact", "points", *ALLOWED[room].split()}
    assert room == "testing" or "testing" not in used


@pytest.mark.parametrize("package", OWNERS)
def test_packages_with_an_owner(package: str) -> None:
    users = {
        name_of(path)
        for path in FILES
        for name, _ in imports(tree(path))
        if name == package or name.startswith(f"{package}.")
    }
    assert users <= OWNERS[package]


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in TORCH_FREE], ids=name_of)
def test_answers_without_torch(path: Path) -> None:
    heavy = {name.split(".")[0] for name in top_level_imports(path)} & {"torch", "deepspeed", "numpy", "h5py"}
    assert not heavy - ({"numpy"} if name_of(path) in NUMBERS else set())


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "cli"], ids=name_of)
def test_verbs_import_lazily(path: Path) -> None:
    light = {"moemm", "moemm.cli", "moemm.config", "moemm.errors"}
    used = {".".join(name.split(".")[:2]) for name in top_level_imports(path) if name.split(".")[0] == "moemm"}
    assert used - {"moemm.__version__"} <= light
    assert "torch" not in {name.split(".")[0] for name in top_level_imports(path)}


def functions() -> Iterator[tuple[str, int]]:
    for path in [*FILES, ROOT / "setup.py"]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{name_of(path)}:{node.name}", node.end_lineno - node.lineno + 1


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in [*FILES, ROOT / "setup.py"]}
    assert statistics.median(lengths.values()) < 180
    assert not {name: length for name, length in lengths.items() if length > 700}


def test_functions_are_short() -> None:
    lengths = list(functions())
    assert statistics.median(length for _, length in lengths) < 12
    assert not [(name, length) for name, length in lengths if length > 70]


def public_definitions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for one in node.body:
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) and not one.name.startswith("_"):
            yield one
        elif isinstance(one, ast.ClassDef) and not one.name.startswith("_"):
            yield from public_definitions(one)


@pytest.mark.parametrize("path", [*FILES, ROOT / "setup.py"], ids=name_of)
def test_public_functions_are_annotated_and_documented(path: Path) -> None:
    assert ast.get_docstring(tree(path)) or not tree(path).body, "the file says what it is for"
    for function in public_definitions(tree(path)):
        given = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        missing = [one.arg for one in given if one.annotation is None and one.arg not in ("self", "cls")]
        assert not missing and function.returns is not None, f"{function.name}: annotate {missing or 'the result'}"
        assert ast.get_docstring(function) or overrides(function), f"{function.name} has no docstring"


def overrides(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the contract is stated elsewhere: an override, an overload, or what torch itself calls."""
    names = {ast.unparse(one).split(".")[-1] for one in function.decorator_list}
    return bool(names & {"override", "overload", "setter"}) or function.name in ("forward", "backward", "setup_context")
