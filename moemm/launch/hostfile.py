"""DeepSpeed's hostfile: `worker-0 slots=8`, a host a line."""

from __future__ import annotations

import re
from pathlib import Path

from moemm.config.suggest import missing_path
from moemm.errors import LaunchError

_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> ranks on it, in the file's order. `#` starts a comment.

    Raises LaunchError with the line where one is malformed, names a host again, or gives it no rank; for an empty file.
    """
    if not path.is_file():
        raise LaunchError(missing_path(path, what="hostfile"))
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or int(match[2]) < 1:
            raise LaunchError(f"{path}:{number}: {text!r} must be HOST slots=RANKS, with 1 rank or more")
        if match[1] in hosts:
            raise LaunchError(f"{path}:{number}: the host {match[1]} is named twice; add its slots up in one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise LaunchError(f"{path} names no host; write HOST slots=RANKS, a host a line")
    return hosts
