"""What a run of the tests did not check on this machine, in its last lines: a skip alone is easily overlooked."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator

import pytest
from machine import why_no_bits, why_no_hosts, why_no_slurm

# A shell gives its background jobs an ignored SIGINT, and every process that a test starts would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def alone() -> Iterator[None]:
    """Training in this process changes its environment and torch's determinism; both are put back."""
    import torch

    before, deterministic = dict(os.environ), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.use_deterministic_algorithms(deterministic)


SOAK = os.environ.get("MOEMM_SOAK") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not SOAK:
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="takes long: make soak, or MOEMM_SOAK=1"))


def unchecked() -> list[str]:
    """One line for each tool or device that tests need and that is not here, and one for tests that take long."""
    import torch

    home = os.environ.get("CUDA_HOME")
    found = []
    if shutil.which("nvcc", path=f"{home}/bin" if home else None) is None:
        found.append("no nvcc: the .cu files were NOT compiled (set CUDA_HOME, or put nvcc on PATH)")
    if not torch.cuda.is_available():
        found.append("no CUDA device: tests marked gpu did NOT run (benchmarks/gpu/run.sh runs them on one)")
    if why_no_slurm():
        found.append(f"SLURM: jobs were NOT submitted, preempted and requeued: {why_no_slurm()}")
    if why_no_hosts():
        found.append(f"hostfiles: two hosts did NOT train together: {why_no_hosts()}")
    if why_no_bits():
        found.append(f"golden curves: bits were NOT compared, losses to 1e-4: another kind of machine: {why_no_bits()}")
    if not SOAK:
        found.append("tests marked soak, which take long, did NOT run (make soak, or MOEMM_SOAK=1)")
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in unchecked():
        terminalreporter.write_line(f"not checked here: {line}", yellow=True)
