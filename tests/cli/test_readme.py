"""The commands of the README do what it says: each is run as it stands there, in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^    (moemm .*)$", README, re.MULTILINE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, the data, and a short run where `make train` would have left one."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("configs", "data"):
        (place / name).symlink_to(ROOT / name)
    recipe = "configs/recipes/quickstart.yaml"
    short = ["--train.steps", "3", "--train.baselines", "false"]
    assert run(place, [sys.executable, "-m", "moemm", "train", recipe, *short]).returncode == 0
    return place


def run(place: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=200, check=False)


def test_the_readme_has_the_commands_that_are_run_here() -> None:
    assert [command.split()[1] for command in COMMANDS] == [
        "status",
        "evaluate",
        "evaluate",
        "predict",
        "inspect",
        "analyze",
        "report",
        "doctor",
        "checkpoint",
        "export",
        "plan",
        "data",
        "config",
        "launch",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(folder: Path, command: str) -> None:
    done = run(folder, [sys.executable, "-m", *shlex.split(command)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) > 1


def test_python_example(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    done = run(folder, [sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    score, speed = map(float, done.stdout.splitlines()[-1].split())
    assert 0.4 < score < 1.0 and speed > 0


def test_launcher_lines_name_real_options() -> None:
    lines = re.findall(r"^    (?:deepspeed|torchrun) .* (?:-m|--module) moemm (train .*)$", README, re.MULTILINE)
    assert len(lines) == 2
    from moemm.config import load_config

    for line in lines:
        words = shlex.split(line)
        assert load_config(ROOT / words[1], words[2:]).config.deepspeed.zero_stage in (2, 3)


def test_linked_pages_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
