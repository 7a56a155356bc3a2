"""Nearest names: for a key, verb or file that does not exist, the one that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

MAX_LISTED = 12


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate most like `name`, or None where none reaches `cutoff` (1: the same, but for case and dashes)."""
    by_plain = {_plain(candidate): candidate for candidate in candidates}
    matches = difflib.get_close_matches(_plain(name), list(by_plain), n=1, cutoff=cutoff)
    return by_plain[matches[0]] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?` with the nearest candidate, or an empty string."""
    match = nearest(name, candidates)
    return f"; did you mean {match}?" if match else ""


def missing_path(path: Path, *, what: str) -> str:
    """Message for a `path` that does not exist: what is there instead, and the nearest name.

    what: the thing that was looked for ("config file", "run folder").
    """
    folder = path.parent
    broken = path
    while not folder.is_dir() and folder != folder.parent:
        folder, broken = folder.parent, folder
    names = _names(folder, suffix=broken.suffix)
    lines = [f"{path}: no such {what}"]
    if folder != path.parent:
        lines.append(f"  the folder {broken} does not exist")
    elif not path.is_absolute():
        lines.append(f"  relative to the working directory {Path.cwd()}")
    lines.append(f"  {'the working directory' if folder == Path() else folder} holds {listed(names) or 'nothing'}")
    match = nearest(broken.name, names)
    if match:
        lines.append(f"  did you mean {folder / match}?")
    return "\n".join(lines)


def listed(names: Iterable[str]) -> str:
    """`a, b, c`, cut after a dozen."""
    names = list(names)
    more = f", and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _names(folder: Path, *, suffix: str) -> list[str]:
    """What is in the folder: only what has the same ending, if anything has."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return [name for name in names if suffix and name.endswith(suffix)] or names


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
