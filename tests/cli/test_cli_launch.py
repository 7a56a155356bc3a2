"""`moemm launch` on the command line, and launchers/, which shows what it starts.

After a wanted change of the SLURM template: python tests/cli/test_cli_launch.py
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moemm.launch.template import TEMPLATES

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"
RECIPE = "configs/recipes/quickstart.yaml"
# What each script is an example of; its own second line says the same.
EXAMPLES = {
    "single_node": f"{RECIPE} --cpus-per-rank 8 --python python",
    "multi_node": f"{RECIPE} --nodes 4 --cpus-per-rank 8 --python python",
    "array": f"{RECIPE} --gpus-per-node 1 --cpus-per-rank 8 --python python --array train.lr=2e-3,1e-3,5e-4 "
    "--array train.seed=0,1",
    "requeue": f"{RECIPE} --nodes 4 --cpus-per-rank 8 --time 4:00:00 --partition preemptible --python python --requeue",
    "apptainer": f"{RECIPE} --nodes 4 --cpus-per-rank 8 --container moemm.sif --mount /data --requeue",
    "pyxis": f"{RECIPE} --nodes 4 --cpus-per-rank 8 --container moemm.sqsh --mount /data --requeue",
}

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def example(name: str) -> str:
    """The script that `moemm launch slurm ... --dry-run` prints in the source folder."""
    command = [sys.executable, "-m", "moemm", "launch", "slurm", *shlex.split(EXAMPLES[name]), "--dry-run"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True).stdout


def test_every_script_is_an_example() -> None:
    assert {path.stem for path in (LAUNCHERS / "slurm").iterdir()} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_what_is_submitted(name: str) -> None:
    text = (LAUNCHERS / "slurm" / f"{name}.sbatch").read_text()
    assert text == example(name), __doc__
    assert text.splitlines()[1] == f"# moemm launch slurm {EXAMPLES[name]}"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_the_other_scripts_are_what_is_started() -> None:
    for name in ("local.sh", "multinode.sh"):
        assert (LAUNCHERS / name).samefile(TEMPLATES / name) and os.access(LAUNCHERS / name, os.X_OK)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["slurm", "nowhere.yaml"], 2, "nowhere.yaml: no such config file"),
        (["slurm", "tiny.yaml", "--nodes", "0"], 6, "--nodes is 0; it must be 1 or more"),
        (["slurm", "tiny.yaml", "--nodes", "7"], 2, "cannot be dealt out to 56 ranks"),
        (["slurm", "tiny.yaml", "--time", "soon"], 6, "--time 'soon' is no time of SLURM"),
        (["slurm", "tiny.yaml", "--array", "train.warmpu=0,1"], 2, "did you mean train.warmup"),
        (["slurm", "tiny.yaml", "--array", "train.batch_size=64,65"], 2, "given:   65"),
        (["slurm", "tiny.yaml", "--train.step", "3"], 2, "did you mean train.steps"),
        (["slurm", "tiny.yaml", "--node", "3"], 2, "did you mean --nodes?"),
        (["slurm", "tiny.yaml"], 6, "There is no sbatch on PATH"),
        (["local", "tiny.yaml"], 6, "--ranks is 0; give 1 or more"),
        (["local", "tiny.yaml", "--ranks", "7"], 2, "cannot be dealt out to 7 ranks"),
        (["deepspeed", "tiny.yaml", "--hostfile", "none"], 6, "none: no such hostfile"),
        (["torchrun", "tiny.yaml", "--hostfile", "hosts", "--ranks", "2"], 6, "have 8 slots; leave --ranks out"),
        (["mpi", "tiny.yaml"], 2, "verbs: deepspeed, local, slurm, torchrun"),
    ],
)
def test_errors(moemm: Run, recipe: Path, arguments: list[str], code: int, said: str) -> None:
    (recipe.parent / "hosts").write_text("a slots=4\nb slots=4\n")
    done = moemm("launch", *arguments, PATH="/nowhere")
    assert done.returncode == code and said in done.stderr, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


def test_dry_runs_start_nothing(moemm: Run, recipe: Path) -> None:
    printed = moemm("launch", "slurm", "tiny.yaml", "--nodes", "4", "--dry-run", "--train.lr", "0.5", PATH="/nowhere")
    assert printed.returncode == 0
    assert printed.stdout.startswith("#!/bin/bash\n# moemm launch slurm tiny.yaml --nodes 4 --train.lr 0.5\n")
    assert f"{sys.executable} -u -m moemm train tiny.yaml --train.lr 0.5 --resume\n" in printed.stdout
    for launcher in ("local", "torchrun", "deepspeed"):
        line = moemm("launch", launcher, "tiny.yaml", "--ranks", "4", "--resume", "--dry-run", PATH="/nowhere").stdout
        assert line.startswith(f"PYTHON={sys.executable} bash ") and line.endswith(" 4 tiny.yaml --resume\n")


def test_what_was_submitted_is_said(moemm: Run, recipe: Path) -> None:
    stand_in = recipe.parent / "sbatch"
    stand_in.write_text("#!/bin/sh\ncat >/dev/null\necho 12\n")
    stand_in.chmod(0o755)
    path = f"{recipe.parent}:/usr/bin:/bin"
    one = moemm("launch", "slurm", "tiny.yaml", "--gpus-per-node", "2", "--train.output", "runs/a", PATH=path).stdout
    assert one.startswith("job 12: 1 node(s) x 2 rank(s)\n")
    assert "tail -F tiny-12.out" in one and "tail -F runs/a/metrics.jsonl" in one
    assert "scancel --signal=USR1 12    # its script can be submitted again" in one
    many = moemm("launch", "slurm", "tiny.yaml", "--array", "train.lr=1,2", "--requeue", PATH=path).stdout
    assert "2 tasks" in many and "tail -F tiny-12_*.out" in many and "-sweep/*/metrics.jsonl" in many
    assert "# queued again" in many


if __name__ == "__main__":
    for one in EXAMPLES:
        (LAUNCHERS / "slurm" / f"{one}.sbatch").write_text(example(one))
