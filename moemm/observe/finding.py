"""What one check of `moemm doctor` found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """status: `ok`; `note` for what is worth knowing; `problem` for what stops or harms a run.

    advice: what to do about it, a command where there is one. data: the same as JSON types.
    """

    name: str
    status: Literal["ok", "note", "problem"]
    text: str
    advice: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
