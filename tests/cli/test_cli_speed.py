"""Help and config errors answer at once, and without torch. CPU time is measured: other tests share the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = """\
modalities: {image: {kind: image, shape: [1, 28, 28]}}
tasks: {digits: {outputs: 10, samples: 1000, modalities: [image]}}
"""
HEAVY = {"torch", "deepspeed", "h5py", "numpy", "matplotlib", "tensorboard"}
IMPORTS = """
import sys
from moemm.cli.app import main
code = main(sys.argv[1:])
print("heavy:", *sorted({heavy} & {{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
sys.exit(code)
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def best_seconds(run: Callable[[], object], *, limit: float, tries: int = 5) -> float:
    """CPU seconds, user and system, of the quickest of some runs of a command; the first below `limit` will do."""
    best = float("inf")
    for _ in range(tries):
        before = os.times()
        run()
        after = os.times()
        best = min(best, after.children_user - before.children_user + after.children_system - before.children_system)
        if best < limit:
            break
    return best


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "explain"], ["config", "show"]])
def test_help_takes_less_than_a_second(arguments: list[str], moemm: Run) -> None:
    assert best_seconds(lambda: moemm(*arguments), limit=1.0) < 1.0


def test_a_config_error_takes_less_than_two_seconds(moemm: Run, recipe: Path) -> None:
    def run() -> None:
        done = moemm("train", recipe, "--model.dmi", "3")
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {recipe}: 1 problem")
        assert "Traceback" not in done.stderr

    assert best_seconds(run, limit=2.0) < 2.0


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["config", "explain"], ["config", "show", "tiny.yaml"], ["train", "tiny.yaml", "--model.dim", "no"],
     ["train", "--help"], ["evaluate", "--help"], ["doctor", "--help"], ["evaluate", "nowhere"],
     ["launch", "slurm", "tiny.yaml", "--dry-run"], ["launch", "local", "tiny.yaml", "--ranks", "2", "--dry-run"],
     ["status", "--help"], ["status", "run"],
     ["plan", "--help"], ["plan", "tiny.yaml", "--data", "data.yaml", "--gpus", "64xH100"]],
)  # fmt: skip
def test_nothing_heavy_is_imported(arguments: list[str], recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: run")
    (tmp_path / "data.yaml").write_text(DATA)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        timeout=60,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "heavy:", done.stderr


def test_no_colours_where_there_is_no_terminal(moemm: Run, recipe: Path) -> None:
    for arguments in (["--help"], ["train", "--help"], ["train", recipe, "--model.dim", "no"], ["train", "--no"]):
        done = moemm(*arguments)
        assert "\x1b" not in done.stdout + done.stderr


def test_a_closed_pipe_ends_quietly(recipe: Path) -> None:
    command = f"{sys.executable} -m moemm config explain --markdown | head -n 1"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "# Configuration\n" and "Traceback" not in done.stderr
