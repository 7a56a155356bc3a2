"""docs/add_a_harmonizer.md and docs/harmonize.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moemm.harmonize import HARMONIZERS

ROOT = Path(__file__).parents[3]


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "add_a_harmonizer.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    block = block.replace("runs/even", str(tmp_path / "run"))
    monkeypatch.chdir(ROOT)
    try:
        exec(compile(block, "docs/add_a_harmonizer.md", "exec"), {})
    finally:
        HARMONIZERS.pop("even", None)
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "digit | motion" in next(event for event in events if event["event"] == "train")["conflict"]


def test_every_method_has_a_line() -> None:
    page = (ROOT / "docs" / "harmonize.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(HARMONIZERS)
