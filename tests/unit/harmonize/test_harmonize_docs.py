"""docs/add_a_harmonizer.md and docs/harmonize.md."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import pytest

from moemm.config.schema import HarmonizeConfig
from moemm.harmonize import HARMONIZERS, SCALES

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


@pytest.mark.parametrize(("section", "names"), [("## Methods", HARMONIZERS), ("## Losses of different size", SCALES)])
def test_every_method_has_a_line(section: str, names: dict[str, object]) -> None:
    page = (ROOT / "docs" / "harmonize.md").read_text(encoding="utf-8")
    part = page.partition(f"{section}\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)) == set(names)


def test_every_scale_is_known_to_the_configuration() -> None:
    known = typing.get_args(typing.get_type_hints(HarmonizeConfig)["scale"])
    assert set(known) == {"none", *SCALES}
