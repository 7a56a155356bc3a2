"""metrics.jsonl: one JSON object a line, made to be read while the run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends to `path`. With `after` the lines of later steps, of a try that a resume goes back behind, are left out.

    A value that JSON lacks (NaN, infinity) is written as null.
    """

    def __init__(self, path: Path, *, after: int = 0) -> None:
        kept = [line for line in _lines(path) if _step(line) <= after] if after else []
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: Mapping[str, Any]) -> None:
        """One line, flushed."""
        self._file.write(json.dumps(_plain(values), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    try:
        return float(json.loads(line).get("step", 0))
    except (ValueError, AttributeError):
        return float("inf")  # a line cut short by a crash is dropped


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value
