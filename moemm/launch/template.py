"""Fill in a script of templates/: `{{name}}` is a value, `#if NAME` to `#end` stands only where NAME has one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
"""Folder of the scripts; in an installed package too."""

_FIELD = re.compile(r"\{\{(\w+)\}\}")


def fill(text: str, values: Mapping[str, str | None]) -> str:
    """`text` with its values; a line that names a value which is None is left out.

    A value of several lines stands in its line's place. KeyError for a name that `values` has not.
    """
    return "".join(f"{line}\n" for line in _lines(text, values))


def _lines(text: str, values: Mapping[str, str | None]) -> Iterator[str]:
    shown = True
    for line in text.splitlines():
        if line.startswith("#if "):
            shown = values[line[4:]] is not None
        elif line == "#end":
            shown = True
        elif shown:
            parts: list[str | None] = list(_FIELD.split(line))  # text and names in turn
            parts[1::2] = [values[str(name)] for name in parts[1::2]]
            if None not in parts:
                yield "".join(map(str, parts))
