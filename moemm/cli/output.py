"""Where verbs print: rich's formatting on a terminal, plain text of a fixed width elsewhere."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rich.console import Console

PLAIN_WIDTH = 120


def show(renderable: Any) -> None:
    """Print a rich renderable, or text as it is, on stdout."""
    if isinstance(renderable, str):
        print(renderable)
        return
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    Console(width=width, highlight=False).print(renderable)


def show_json(values: Any) -> None:
    """Print `values` as JSON, sorted as they are, two spaces a level."""
    print(json.dumps(values, indent=2, ensure_ascii=False, default=str))
