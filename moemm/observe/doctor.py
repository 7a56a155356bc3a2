"""`moemm doctor`: one finding per thing that a run depends on, and what to do about each that is wrong.

A check that fails itself is a finding too: the doctor never dies of what it looks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from moemm.observe import checkup, selftest
from moemm.observe.finding import Finding

CHECKS: tuple[tuple[str, Callable[[], list[Finding]]], ...] = (
    ("versions", checkup.versions),
    ("ops", checkup.ops),
    ("deepspeed", checkup.deepspeed_engine),
    ("compilers", checkup.compilers),
    ("gpus", checkup.gpus),
    ("megablocks", checkup.megablocks),
    ("build locks", checkup.build_locks),
    ("shared memory", checkup.shared_memory),
    ("self test: ops", selftest.ops_agree),
    ("self test: training", selftest.three_steps),
)

_COLOURS = {"ok": "green", "note": "yellow", "problem": "bold red"}


def diagnose() -> list[Finding]:
    """Run every check, in order. Takes some ten seconds, most of it importing torch and DeepSpeed."""
    return [finding for name, check in CHECKS for finding in _guarded(name, check)]


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether there is no problem among them; notes do not count."""
    return all(finding.status != "problem" for finding in findings)


def to_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """For --json: {"healthy": bool, "findings": [{"name", "status", "text", "advice", "data"}, ...]}."""
    entries = [
        {"name": f.name, "status": f.status, "text": f.text, "advice": f.advice, "data": f.data} for f in findings
    ]
    return {"healthy": healthy(findings), "findings": entries}


def render(findings: Sequence[Finding]) -> Table:
    """A table: what, how it is, and what to do."""
    problems = sum(finding.status == "problem" for finding in findings)
    verdict = "healthy" if not problems else f"{problems} problem{'s' if problems > 1 else ''}"
    table = Table(title="moemm doctor", caption=verdict, box=None, padding=(0, 1), title_justify="left")
    table.caption_justify = "left"
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("finding")
    for finding in findings:
        text = finding.text if finding.advice is None else f"{finding.text}\n-> {finding.advice}"
        table.add_row(finding.name, f"[{_COLOURS[finding.status]}]{finding.status}[/]", text.replace("[", r"\["))
    return table


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as error:  # a broken installation can raise anything, and that is what is to be reported
        return [Finding(name=name, status="problem", text=f"{type(error).__name__}: {error}")]
