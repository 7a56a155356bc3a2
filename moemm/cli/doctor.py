"""`moemm doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moemm.cli.output import show, show_json


@dataclass(kw_only=True)
class Doctor:
    """Say what is installed, which ops are live and why, what is wrong and what to do about it; then a self test.

    Exit code 0: healthy; 1: problems.
    """

    json: bool = False
    """Print JSON instead of a table."""

    def run(self, overrides: Sequence[str]) -> int:
        """Print the findings; 0 without problems, else 1."""
        del overrides
        from moemm.observe.doctor import diagnose, healthy, render, to_dict

        findings = diagnose()
        if self.json:
            show_json(to_dict(findings))
        else:
            show(render(findings))
        return 0 if healthy(findings) else 1
