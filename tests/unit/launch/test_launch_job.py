"""The SLURM job as text, and as a script with stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from moemm.errors import LaunchError
from moemm.launch import SlurmJob, slurm_script, submit, sweep
from moemm.launch.slurm import seconds
from moemm.launch.template import TEMPLATES, fill

SRUN = """\
#!/bin/bash
printf '%s\\n' "$@" >srun.txt
env >srun.env
exit "$SRUN_ENDS"
"""
SCONTROL = """\
#!/bin/bash
[[ $1 == requeue ]] && echo "$2" >requeued.txt && exit 1 # SLURM would end the script here
echo "JobState=RUNNING PreemptTime=${PREEMPTED:-None}"
"""


def script(**changes: Any) -> str:
    asked = {"name": "run", "nodes": 2, **changes}
    points = sweep(asked.pop("axes", ()), output="runs/a")
    return slurm_script(
        SlurmJob(**asked), command="moemm launch", python="python", arguments=["a.yaml", "--name", "b c"], points=points
    )


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def execute(text: str, folder: Path, **environ: str) -> int:
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(code)
        (folder / name).chmod(0o755)
    told = {"PATH": f"{folder}:{os.environ['PATH']}", "SRUN_ENDS": "0", "SLURM_JOB_ID": "7", **environ}
    return subprocess.run(["bash"], input=text, text=True, cwd=folder, env=told, timeout=20, check=False).returncode


def test_what_is_not_asked_for_is_not_in_the_script() -> None:
    assert directives(script(gpus_per_node=0)) == [
        "--job-name=run",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--time=24:00:00",
        "--output=%x-%j.out",
        "--open-mode=append",
        "--signal=USR1@120",
        "--no-requeue",
    ]
    assert "requeue" not in script().replace("--no-requeue", "") and "ARRAY" not in script()


def test_what_is_asked_for_is_in_the_script() -> None:
    asked = {"partition": "p", "account": "a", "qos": "q", "sbatch": ["exclusive", "--mem=4G"], "cpus_per_rank": 6}
    found = directives(script(gpus_per_node=4, requeue=True, save_s=9, axes=["train.lr=1,2"], **asked))
    wanted = "gpus-per-node=4 ntasks-per-node=4 cpus-per-task=6 partition=p account=a qos=q exclusive mem=4G requeue"
    assert {f"--{one}" for one in wanted.split()} <= set(found)
    assert "--array=0-1" in found and "--signal=USR1@9" in found and "--output=%x-%A_%a.out" in found
    assert script(gpus_per_node=4, ranks_per_node=2).count("--ntasks-per-node=2") == 1


def test_srun_gets_the_words_as_they_were_typed(tmp_path: Path) -> None:
    assert execute(script(cpus_per_rank=3), tmp_path, SLURM_CPUS_PER_TASK="3") == 0
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert words[-9:] == ["python", "-u", "-m", "moemm", "train", "a.yaml", "--name", "b c", "--resume"]
    environ = (tmp_path / "srun.env").read_text().splitlines()
    assert {"OMP_NUM_THREADS=3", "SRUN_CPUS_PER_TASK=3"} <= set(environ)


def test_each_task_of_an_array_has_its_values(tmp_path: Path) -> None:
    text = script(axes=["train.lr=1e-3,1e-4", "name=x y,z"])
    assert execute(text, tmp_path, SLURM_ARRAY_TASK_ID="2") == 0
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert words[words.index("b c") + 1 :] == [
        "--train.lr", "1e-4", "--name", "x y", "--train.output", "runs/a-sweep/lr_1e-4-name_x-y", "--resume"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "preempted", "requeue", "again"),
    [
        (0, "", True, False),
        (85, "", True, True),
        (85, "", False, False),
        (7, "", True, False),
        (143, "", True, False),
        (143, "2026-01-01T00:00:00", True, True),
        (0, "2026-01-01T00:00:00", True, False),
    ],
)
def test_what_is_queued_again(tmp_path: Path, code: int, preempted: str, requeue: bool, again: bool) -> None:
    assert execute(script(requeue=requeue), tmp_path, SRUN_ENDS=str(code), PREEMPTED=preempted) == code
    assert (tmp_path / "requeued.txt").exists() == again
    assert not again or (tmp_path / "requeued.txt").read_text() == "7\n"


@pytest.mark.parametrize("image", ["my image.sif", "docker://a/b", "b.sqsh"])
def test_containers(tmp_path: Path, image: str) -> None:
    assert execute(script(container=image, mount=["/data"]), tmp_path) == 0
    words = (tmp_path / "srun.txt").read_text().splitlines()
    here = str(tmp_path)
    wanted = ["apptainer", "exec", "--nv", "--bind", here, "--bind", "/data", "--pwd", here, image]
    if image == "b.sqsh":
        mounts = f"--container-mounts={here}:{here},/data:/data"
        wanted = ["--container-image=b.sqsh", mounts, f"--container-workdir={here}"]
    start = words.index(wanted[0])
    assert words[start : start + len(wanted) + 1] == [*wanted, "python"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-2:3", 93780), ("1-0:0:1", 86401),
     ("UNLIMITED", None)],
)  # fmt: skip
def test_times(text: str, wanted: int | None) -> None:
    assert seconds(text) == wanted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": 0}, "--nodes is 0; it must be 1 or more"),
        ({"gpus_per_node": -1}, "--gpus-per-node is -1"),
        ({"ranks_per_node": -1}, "--ranks-per-node is -1"),
        ({"time": "1h"}, "--time '1h' is no time of SLURM"),
        ({"time": "1:2:3:4"}, "no time of SLURM"),
        ({"time": "0:0"}, "no time at all"),
        ({"time": "2", "save_s": 120}, "--save-s is 120"),
        ({"save_s": 0}, "--save-s is 0"),
        ({"partition": "a\n#SBATCH --x"}, "--partition .* more than one line"),
        ({"sbatch": ["a\nb"]}, "--sbatch .* more than one line"),
    ],
)
def test_jobs_that_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        script(**change)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["train.lr"], "write KEY=VALUE,VALUE"),
        (["train.lr=1,,2"], "write KEY=VALUE,VALUE"),
        (["train.lr=1,1"], "--array train.lr: the value 1 is given twice"),
        (["train.lr=1", "train.lr=2"], "the key train.lr is given twice"),
        (["name=a b,a-b"], "written alike: name_a-b"),
        ([f"train.seed={','.join(map(str, range(101)))}", "train.lr=1,2,3,4,5,6,7,8,9,10"], "makes 1010 combinations"),
    ],
)
def test_sweeps_that_are_refused(axes: list[str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        sweep(axes, output="runs/a")


def test_sweeps_name_their_runs() -> None:
    assert sweep([], output="runs/a") == []
    lists = sweep(["train.only=[a,b],[c]"], output="runs/a/")
    assert [point.overrides for point in lists] == [
        ["--train.only", "[a,b]", "--train.output", "runs/a-sweep/only_-a-b-"],
        ["--train.only", "[c]", "--train.output", "runs/a-sweep/only_-c-"],
    ]
    same = sweep(["model.heads=1", "data.heads=2"], output="runs/a")
    assert same[0].name == "model.heads_1-data.heads_2"
    assert sweep(["train.output=x,y"], output="runs/a")[1].overrides == ["--train.output", "y"]


def test_no_sbatch_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"no sbatch on PATH.*--dry-run"):
        submit(script())


def test_what_sbatch_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(LaunchError, match="sbatch refused the job: sbatch: error: invalid partition"):
        submit(script())
    (tmp_path / "sbatch").write_text("#!/bin/sh\n[ \"$1\" = --parsable ] && cat >got.txt && echo '12;cluster'\n")
    monkeypatch.chdir(tmp_path)
    assert submit(script()) == "12"
    assert (tmp_path / "got.txt").read_text() == script()


def test_templates() -> None:
    text = "a={{a}} b={{b}}\n#if b\nonly {{a}}\n#end\nend\n"
    assert fill(text, {"a": "1", "b": "x\ny"}) == "a=1 b=x\ny\nonly 1\nend\n"
    assert fill(text, {"a": "1", "b": None}) == "end\n"
    with pytest.raises(KeyError):
        fill(text, {"a": "1"})


def test_the_templates_are_part_of_the_package() -> None:
    root = Path(__file__).parents[3]
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["moemm"]
    shipped = {path for pattern in declared for path in (root / "moemm").glob(pattern)}
    assert set(TEMPLATES.iterdir()) <= shipped and len(set(TEMPLATES.iterdir())) == 3
