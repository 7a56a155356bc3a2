"""Tables of benchmarks/results: on the terminal, and inside the docs between their markers.

    python -m benchmarks.tables                # all results, misses first
    python -m benchmarks.tables --docs         # write the tables of README.md and docs/*.md anew

A marker line `<!-- results: NAME -->` is followed by the table and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"<!-- results: (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)
HEADER = ("case", "metric", "value", "target", "")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a result as text."""
    value = "not measured" if row["value"] is None else number(row["value"])
    if row["deviation"] is not None:
        value += f" ± {number(row['deviation'])}"
    target = "" if row["target"] is None else ("≥ " if row["better"] == "higher" else "≤ ") + number(row["target"])
    verdict = {True: "met", False: "missed", None: ""}[row["ok"]]
    return [row["case"], row["metric"], f"{value} {row['unit']}".strip(), target, verdict]


def number(value: float) -> str:
    """Three decimals for scores and ratios, thousands separated for large figures."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"


def markdown(result: dict[str, Any]) -> str:
    """A result as a Markdown table with the command that made it."""
    lines = ["| " + " | ".join(HEADER) + " |", "| --- | --- | --: | --: | --- |"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]
    place = result["machine"]
    source = f"`{result['command']}`, {place['cores']} cores of {place['cpu']}"
    if place["gpu"]:
        source += f", {place['gpu']}"
    seeds = f", seeds {', '.join(map(str, result['seeds']))}" if result["seeds"] else ""
    return "\n".join([*lines, "", f"{source}, torch {result['versions']['torch']}{seeds}."])


def with_tables(text: str) -> str:
    """A document with the tables of its markers made anew."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match['name']}.json").read_text(encoding="utf-8"))
        return f"<!-- results: {match['name']} -->\n{markdown(result)}\n<!-- end -->"

    return MARKER.sub(table, text)


def documents() -> list[Path]:
    """The documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def show(paths: Sequence[Path]) -> None:
    """Print results as one table, missed targets first."""
    from rich.console import Console
    from rich.table import Table

    table = Table("result", *HEADER)
    rows = [
        (json.loads(path.read_text(encoding="utf-8"))["name"], row)
        for path in paths
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    for name, row in sorted(rows, key=lambda item: {False: 0, None: 2, True: 1}[item[1]["ok"]]):
        table.add_row(name, *cells(row), style="red" if row["ok"] is False else None)
    Console().print(table)


def main() -> None:
    """Print the results, or write the tables of the documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the tables of README.md and docs/*.md anew")
    if parser.parse_args().docs:
        for path in documents():
            path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        show(sorted(RESULTS.glob("*.json")))


if __name__ == "__main__":
    main()
