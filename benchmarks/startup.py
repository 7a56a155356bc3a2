"""From the command to the first step, beside what nobody can do without: import torch and DeepSpeed, open the data.

    python -m benchmarks.startup               # some minutes; on a machine that is otherwise idle

`moemm train` on the quickstart with its six files, measured until it prints the line of its first step, and a script
that imports torch and deepspeed, opens the same files and reads one sample of each. The two take turns; the median of
the ratios of each turn. CPU time is that of the process until that line, with the processes that it has waited for; it
depends less on what else runs, and the ratio still less: seconds are not written down.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import Row
from benchmarks.runs import ROOT, deviation

RECIPE = "configs/recipes/quickstart.yaml"
TARGET = 1.5
NEEDED = """
import sys
import torch, deepspeed
from moemm.data import DataFile
files = [DataFile(path) for path in sys.argv[1:]]
for file in files:
    file.sample(0)
print("step 1/", flush=True)
"""


def needed(files: Sequence[Path]) -> list[str]:
    """The command of the script that does nothing but what has to be done."""
    return [sys.executable, "-W", "ignore", "-c", NEEDED, *map(str, files)]


def started(output: Path, recipe: str = RECIPE) -> list[str]:
    """The command of a run that says when its first step is done."""
    options = ["--train.output", str(output), "--train.steps", "100", "--train.log_every", "1"]
    return [sys.executable, "-W", "ignore", "-m", "moemm", "train", recipe, *options, "--train.baselines", "false"]


def until_first_step(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU seconds until a command prints a line that begins with `step 1/`; then it is ended.

    Raises SystemExit with its errors where it ends without such a line.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("step 1/"):
                    return time.perf_counter() - began, _cpu_seconds(process.pid)
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} did no step:\n{errors.read()[-3000:]}")
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with the workers of its loader
            process.wait()
            process.stdout.close()


def _cpu_seconds(pid: int) -> float:
    # After the name, which may hold spaces: utime, stime, cutime, cstime are the fields 14 to 17 of proc(5).
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def rows_of(times: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """The medians of the ratios of each round: a clock that goes slower for a while slows both.

    times: way, the run first -> (wall, CPU) seconds of each round.
    """
    rows = []
    for clock, name in enumerate(("time", "CPU time")):
        ratios = [run[clock] / least[clock] for run, least in zip(*times.values(), strict=True)]
        rows.append(
            Row(case="moemm train", metric=f"{name} / least", value=statistics.median(ratios),
                deviation=deviation(ratios), better="lower", target=TARGET)
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure, write results/startup.json, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=13, help="how often each is started; the first does not count")
    rounds = parser.parse_args().rounds
    began = time.perf_counter()
    files = sorted((ROOT / "data" / "quickstart").glob("*.h5"))
    ways = ("moemm train, to the first step", "least: import torch, deepspeed; open the data")
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for way, command in zip(ways, (started(Path(folder) / str(number)), needed(files)), strict=True):
                measured = until_first_step(command)
                if number:  # the first fills the file cache
                    times[way].append(measured)
    rows = rows_of(times)
    load = os.getloadavg()[1]
    rows.append(Row(case="machine", metric="processes that wanted to run, 5 min", value=load, better="lower"))
    path = record.write("startup", rows, seconds=time.perf_counter() - began)
    from benchmarks.tables import show

    show([path])


if __name__ == "__main__":
    main()
