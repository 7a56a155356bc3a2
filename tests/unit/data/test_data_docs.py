from __future__ import annotations

import re
from pathlib import Path

import pytest

from moemm.data import DataFile, limits, validate_file

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), {})
    assert "60 ['accel', 'image', 'note', 'record']" in capsys.readouterr().out
    with DataFile("ward.h5") as file:
        assert "accel" not in file.sample(7) and "note" not in file.sample(8)
    assert validate_file("ward.h5").ok


def test_the_limits_are_as_documented() -> None:
    for value, text in (
        (limits.MAX_CHUNK_BYTES, "chunks over 32 MiB"),
        (limits.MAX_ROW_BYTES, "samples over 64 MiB"),
        (limits.MAX_TEXT_BYTES, "texts over 1 MiB"),
        (limits.CACHE_BYTES, "256 MiB of decoded arrays"),
        (limits.CHUNK_CACHE_BYTES, "64 MiB of\ndecoded chunks"),
        (limits.MAX_ATTRIBUTE_BYTES, "1 MiB an attribute"),
    ):
        assert text in PAGE
        assert limits.size(value).replace(".0", "") in text.replace("\n", " ")
    for number, text in (
        (limits.MAX_MODALITIES, "modalities"),
        (limits.MAX_LINKS, "names"),
        (limits.MAX_ATTRIBUTES, "attr"),
    ):
        assert f"{number:,} {text}" in PAGE
    assert f"{limits.CACHE_RATIO}-fold" in PAGE
