"""Extra memory of one step of a layer: what it holds at its peak over weights, inputs, outputs and gradients.

    python -m benchmarks.memory --way moe_ffn --threads 2     # bytes of each case of cases.MEMORY, as JSON

Measured as the resident memory of a process that does nothing else, from the kernel: VmHWM, set back before a step by
writing 5 to /proc/self/clear_refs, less VmRSS before it. So scratch of MKL, oneDNN and the standard library counts, as
far as a step before it has not left it allocated. Memory that is freed goes back to the system at once: glibc's
threshold for mmap is fixed to 64 KiB. Linux only.

R = T K rows, T tokens, D width, H rows of w1, E experts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import ways
from benchmarks.cases import MEMORY, Case

CLEAR_PEAK = "5"  # proc_pid_clear_refs(5)
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def limit(case: Case) -> int:
    """Bytes of the permuted inputs once, the hidden rows (what the first product gives) once, and two indices a row."""
    rows = case.tokens * case.top_k
    return rows * ((case.dim + 2 * case.width) * case.dtype.itemsize + 2 * 8)


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status: VmRSS (now) or VmHWM (the most since it was set back)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def extra(setting: ways.Setting, way: str) -> int:
    """Bytes that one step of a way holds at its peak over weights, inputs, output and gradients."""
    run = setting.way(way)
    torch.manual_seed(1)
    routing = setting.case.routing()
    ways.results(setting, run, routing)  # allocates what stays: threads, code, scratch of libraries
    return _extra_of_a_step(setting, run, routing)  # one is enough: a second gives the same to 1 MB


def _extra_of_a_step(setting: ways.Setting, run: ways.libraries.Run, routing: tuple[torch.Tensor, torch.Tensor]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(CLEAR_PEAK, encoding="ascii")
    before = resident("VmRSS")
    out_TD, gates_TK = ways.step(setting, run, routing)
    peak = resident("VmHWM")
    kept = [out_TD, *(leaf.grad for leaf in (gates_TK, *setting.leaves()) if leaf.grad is not None)]
    setting.forget()
    return peak - before - sum(tensor.nbytes for tensor in kept)


def measure(way: str, threads: int) -> dict[str, int]:
    """Bytes of each case of cases.MEMORY, in a process of its own; without those that a padding way has no room for."""
    command = [sys.executable, "-m", "benchmarks.memory", "--way", way, "--threads", str(threads)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    folder = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the bytes of one way as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", required=True, choices=ways.names())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for case in MEMORY:
        setting = ways.Setting(case)
        if ways.feasible(case, [options.way], case.routing()[1]):
            found[case.name] = extra(setting, options.way)
        del setting
    print(json.dumps(found))


if __name__ == "__main__":
    main()
