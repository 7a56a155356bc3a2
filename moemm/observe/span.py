"""Lengths of time in words."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`, `3 days 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days {whole % 86400 // 3600} h"
