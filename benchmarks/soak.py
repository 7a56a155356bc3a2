"""The ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer.

    make soak                                  # or: python -m benchmarks.soak; some minutes

Builds moemm._C with both into build/sanitized (the usual build is left alone), runs tests/ops with it and counts what
they report: reads and writes outside of a buffer or after its end, and arithmetic that C++ does not define. Ends with 1
when there is a finding, a failed test, or no test at all. torch itself is not instrumented: what it does inside is not
seen, what moemm's code does with torch's memory is. Leaks are not looked for: Python and torch keep much until the end.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from benchmarks import record
from benchmarks.record import Row

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitized"
REPORTS = FOLDER / "reports.txt"
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")
"""Preloaded: the sanitizers come before what they watch; the C++ library so that they find its functions."""
REPORT = re.compile(r"SUMMARY: AddressSanitizer|runtime error:|^AddressSanitizer:DEADLYSIGNAL")


class Tests(NamedTuple):
    """Counts of a test run."""

    passed: int
    failed: int
    skipped: int


def build() -> Path:
    """moemm with a sanitized moemm._C; the folder to import it from."""
    library = FOLDER / "lib"
    shutil.rmtree(library, ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", library, "--build-temp", FOLDER / "temp"]
    environment = {**os.environ, "MOEMM_SANITIZE": "1", "MOEMM_BUILD": "cpu"}
    log = FOLDER / "build.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [*map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"soak: the build failed; the end of {log}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return library


def preload() -> str:
    """LD_PRELOAD: the sanitizers' libraries of the compiler that built the library."""
    compiler, found = os.environ.get("CXX", "c++"), []
    for name in LIBRARIES:
        command = [*compiler.split(), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            raise SystemExit(f"soak: {compiler} has no {name}; take a GCC with its sanitizers (CXX=g++)")
        found.append(str(Path(path).resolve()))
    return " ".join(found)


def environment(library: Path) -> dict[str, str]:
    """Of the tests: a run goes on after each report. No log_path: with two sanitizers in a process one ignores it."""
    return {
        **os.environ,
        "LD_PRELOAD": preload(),
        "PYTHONPATH": str(library),
        "PYTHONSAFEPATH": "1",  # else the moemm of this checkout would come first
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "2",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:halt_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=0",
    }


def run_tests(library: Path, select: str) -> Tests:
    """tests/ops in a process of its own. Raises SystemExit where it did not end by itself."""
    results = FOLDER / "tests.xml"
    results.unlink(missing_ok=True)
    guard = "import moemm.ops as o; i = o.backend_info(); assert 'fsanitize' in i['build']['flags'], i"
    subprocess.run([sys.executable, "-c", guard], env=environment(library), cwd=FOLDER, check=True)
    # Reports go to the error stream: not captured by pytest, which would show it only where a test fails.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=no", f"--junitxml={results}"]
    command += ["-k", select] if select else []
    command += ["--timeout=1200", "tests/ops"]
    with REPORTS.open("w", encoding="utf-8") as stream:
        done = subprocess.run(command, env=environment(library), cwd=ROOT, stderr=stream, check=False)
    if not results.exists():
        raise SystemExit(f"soak: pytest ended with {done.returncode} and left no results; its errors are in {REPORTS}")
    suites = list(ElementTree.parse(results).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.attrib[name]) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return Tests(total - failures - errors - skipped, failures + errors, skipped)


def findings() -> list[str]:
    """The line of each report that says what and where."""
    lines = REPORTS.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if REPORT.search(line)]


def main() -> None:
    """Build, run, count, write results/soak.json, print; the exit status is 1 unless all is clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-k", dest="select", default="", help="only these tests (pytest -k); writes no results")
    options = parser.parse_args()
    began = time.perf_counter()
    library = build()
    tests = run_tests(library, options.select)
    reports, seconds = findings(), time.perf_counter() - began
    case = "tests/ops, ASan and UBSan"
    rows = [
        Row(case=case, metric="tests passed", value=tests.passed, target=3000),
        Row(case=case, metric="tests failed", value=tests.failed, better="lower", target=0),
        Row(case=case, metric="tests skipped", value=tests.skipped, better="lower"),
        Row(case=case, metric="findings", value=len(reports), better="lower", target=0),
        Row(case=case, metric="time, with the build", value=seconds, unit="s", better="lower"),
    ]
    for line in reports[:20]:
        print(line)
    print(f"soak: {tests.passed} passed, {tests.failed} failed, {len(reports)} findings, {seconds:.0f} s")
    if reports:
        print(f"soak: full reports in {REPORTS}")
    if not options.select:
        record.write("soak", rows, seconds=seconds)
    if reports or tests.failed or not tests.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
